"""Attention of csrc against the specification, in every variant that this processor runs."""

import pytest
import torch
from helpers import assert_no_worse
from test_reference import attention_dropout
from torch import Tensor

from kloss.kernels import Buckets, Offsets, attention_cpu, attention_lists, packed_attention, reference
from kloss.kernels.dropout import Dropout, keep_mask

KINDS = [(torch.float32, 0), (torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float16, 0)]
LENGTHS = {"empty": [0], "one": [1], "short": [3, 0, 16, 1, 17], "blocks": [33, 64, 65], "long": [130]}
SHAPES = [(1, 64), (2, 16), (12, 32), (2, 48)]  # heads, width of each
CASES = [(name, *shape) for name in LENGTHS for shape in SHAPES] + [("longest", 1, 64)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{str(kind[0])[6:]}-{kind[1]}")
def dtype(request, monkeypatch):
    """An element type, with one variant of the code for it."""
    dtype, variant = request.param
    monkeypatch.setattr(attention_cpu, "VARIANT", variant)
    if attention_cpu.dtype_for(torch.empty(0, dtype=dtype)) is None:
        pytest.skip("not built, or not for this processor")
    return dtype


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def owners(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The sequence of each row; rows behind have a number of their own."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(rows, dtype=torch.int32), right=True)


def values(op, qkv: Tensor, cu_seqlens: Tensor, heads: int, dropout: Dropout | None, dout: Tensor) -> list[Tensor]:
    """The output and the gradient of qkv."""
    leaf = qkv.detach().requires_grad_()
    out = op(leaf, cu_seqlens, heads, dropout=dropout)
    return [out.detach(), torch.autograd.grad(out, leaf, dout.to(out.dtype))[0]]


def assert_as_good(qkv: Tensor, cu_seqlens: Tensor, heads: int, dropout: Dropout | None, dout: Tensor) -> None:
    """`assert_no_worse` than the reference, sequence by sequence."""
    assert attention_cpu.fits(qkv, heads)
    got = values(packed_attention, qkv, cu_seqlens, heads, dropout, dout)
    plain = values(reference.packed_attention, qkv, cu_seqlens, heads, dropout, dout)
    oracle = values(reference.packed_attention, qkv.double(), cu_seqlens, heads, dropout, dout)
    for mine, theirs, right in zip(got, plain, oracle, strict=True):
        assert_no_worse(mine, theirs, right, owners(cu_seqlens, len(qkv)))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_output_and_gradient(case, p, dtype):
    name, heads, width = case
    cu_seqlens = offsets(LENGTHS.get(name, [512]))
    rows = int(cu_seqlens[-1]) + 2
    dropout = attention_dropout(cu_seqlens, [i % 3 - 1 for i in range(len(cu_seqlens) - 1)], 2) if p else None
    qkv, dout = normal(rows, 3 * heads * width, dtype=dtype), normal(rows, heads * width, dtype=dtype, seed=1)
    assert_as_good(qkv, cu_seqlens, heads, dropout, dout)


def test_probabilities_too_small_for_a_number(dtype):
    qkv = normal(194, 3 * 64, dtype=dtype)
    qkv[:, :128] *= 30**0.5
    assert_as_good(qkv, offsets([64, 130]), 2, None, normal(194, 64, dtype=dtype, seed=1))


def test_scores_that_leave_one_key(dtype):
    qkv = normal(43, 3 * 32, dtype=dtype)
    qkv[:, :64] *= 1e6 if dtype != torch.float16 else 1e3
    out, dqkv = values(packed_attention, qkv, offsets([43]), 1, None, normal(43, 32, dtype=dtype, seed=1))
    q, k, v = qkv.double().view(43, 3, 32).unbind(1)
    assert torch.equal(out, v[(q @ k.T).argmax(1)].to(dtype)) and not dqkv[:, :64].count_nonzero()


def test_rows_behind_get_zeros_whatever_they_hold(dtype):
    qkv, dout = normal(24, 96, dtype=dtype), normal(24, 32, dtype=dtype, seed=1)
    qkv[20:], dout[20:] = torch.nan, torch.inf
    for lengths in ([17, 3], [0, 0], []):
        cu_seqlens = offsets(lengths)
        end = int(cu_seqlens[-1])
        for values_of in values(packed_attention, qkv, cu_seqlens, 2, attention_dropout(cu_seqlens, None, 24 - end), dout):
            assert not values_of[end:].count_nonzero() and values_of[:end].isfinite().all()


def test_alone_together_shuffled_and_beside_nan_to_the_bit(dtype):
    lengths, heads, width = [4, 20, 150, 1, 16, 37], 2, 32
    cu_seqlens = offsets(lengths)
    dropout = attention_dropout(cu_seqlens, [0, 1, -1, 1, 0, 0], 0)
    rows = [torch.arange(a, b) for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    qkv, dout = normal(228, 3 * heads * width, dtype=dtype), normal(228, heads * width, dtype=dtype, seed=1)
    together = values(packed_attention, qkv, cu_seqlens, heads, dropout, dout)

    def company(sequences, qkv=qkv, dout=dout):
        index = torch.cat([rows[s] for s in sequences])
        return index, values(
            packed_attention, qkv[index], offsets([lengths[s] for s in sequences]), heads, dropout.take(index), dout[index]
        )

    for s in range(6):
        others = torch.ones(228, dtype=torch.bool)
        others[rows[s]] = False
        sick = qkv.masked_fill(others[:, None], torch.nan), dout.masked_fill(others[:, None], torch.inf)
        for index, got in (company([3, 0, 5, 2, 4, 1], *sick), company([s]), company([5, 3, 1, 0, 4, 2])):
            mine = (index[:, None] == rows[s]).any(1).nonzero()[:, 0]
            for one, wanted in zip(got, together, strict=True):
                assert torch.equal(one[mine], wanted[rows[s]]) and one[mine].isfinite().all(), s


def test_nan_stays_in_its_head(dtype):
    for at in (5, 5 + 64, 5 + 128):  # in q, k and v of head 0
        qkv = normal(20, 3 * 64, dtype=dtype)
        qkv[3, at] = torch.nan
        out, dqkv = values(packed_attention, qkv, offsets([20]), 2, None, normal(20, 64, dtype=dtype))
        dqkv = dqkv.view(20, 3, 2, 32)
        assert out[:, 32:].isfinite().all() and dqkv[:, :, 1].isfinite().all()
        assert out[3, :32].isnan().any() and dqkv[:, :, 0].isnan().any()


def test_threads_do_not_change_a_bit(dtype):
    lengths = [200, *range(1, 60), 140]
    cu_seqlens, threads = offsets(lengths), torch.get_num_threads()
    rows = int(cu_seqlens[-1])
    dropout = attention_dropout(cu_seqlens, [i % 3 - 1 for i in range(len(lengths))], 0)
    qkv, dout = normal(rows, 3 * 96, dtype=dtype), normal(rows, 96, dtype=dtype, seed=1)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(values(packed_attention, qkv, cu_seqlens, 3, dropout, dout))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, first) for got in results for one, first in zip(got, results[0], strict=True))


def test_the_mask_is_the_references(dtype):
    """With equal scores and the identity as v, the output shows which probabilities were kept."""
    cu_seqlens, heads, n = offsets([31, 64]), 3, 64
    dropout = attention_dropout(cu_seqlens, [1, 0], 0)
    qkv = torch.zeros(95, 3, heads, n, dtype=dtype)
    qkv[:, 2] = torch.cat([torch.eye(n)[:31], torch.eye(n)])[:, None]
    seen = packed_attention(qkv.flatten(1), cu_seqlens, heads, dropout=dropout).view(95, heads, n)
    keep, scale = keep_mask(dropout, (torch.arange(heads)[:, None] << 16 | torch.arange(n)).int())
    keep[:31, :, 31:] = False
    assert torch.equal(seen != 0, keep)
    wanted = torch.where(keep, scale[:, None, None] / torch.tensor([31.0] * 31 + [64.0] * 64)[:, None, None], 0)
    torch.testing.assert_close(seen, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_strides_and_odd_addresses_do_not_change_a_bit(dtype):
    cu_seqlens, qkv, dout = offsets([5, 18]), normal(23, 96, dtype=dtype), normal(23, 32, dtype=dtype, seed=1)
    dropout = attention_dropout(cu_seqlens, None, 0)
    wanted = values(packed_attention, qkv, cu_seqlens, 2, dropout, dout)

    def moved(tensor, columns, start, step):
        memory = tensor.new_full((23, columns), torch.nan).view(-1)
        view = memory.as_strided(tensor.shape, (columns, step), start)
        return view.copy_(tensor)

    views = {
        "columns apart": (moved(qkv, 200, 0, 2), moved(dout, 70, 1, 2)),
        "rows apart": (moved(qkv, 100, 2, 1), moved(dout, 40, 4, 1)),
        "rows an odd number of elements apart": (moved(qkv, 99, 1, 1), moved(dout, 33, 1, 1)),
        "at an odd element": (qkv.new_empty(23 * 96 + 1)[1:].view(23, 96).copy_(qkv), dout.new_empty(737)[1:].view(23, 32)),
        "transposed": (qkv.t().contiguous().t(), dout.t().contiguous().t()),
    }
    views["at an odd element"][1].copy_(dout)
    for name, tensors in views.items():
        got = values(packed_attention, tensors[0], cu_seqlens, 2, dropout, tensors[1])
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True)), name
    row = qkv[:1].expand(23, -1)
    got = values(packed_attention, row, cu_seqlens, 2, dropout, dout[:1].expand(23, -1))
    same = values(packed_attention, row.contiguous(), cu_seqlens, 2, dropout, dout[:1].repeat(23, 1))
    assert all(torch.equal(one, other) for one, other in zip(got, same, strict=True))
    assert torch.equal(packed_attention(qkv, cu_seqlens.long(), 2, dropout=dropout), wanted[0])


def test_no_rows_at_all():
    qkv = torch.zeros(0, 96, requires_grad=True)
    packed_attention(qkv, offsets([]), 1).sum().backward()
    assert qkv.grad.shape == (0, 96)


def test_addresses_past_2_to_the_31(tmp_path):
    """Rows lie 2^30 elements apart, so the last ones are past what 32 bits reach; the file behind them is sparse."""
    if not attention_cpu.fits(torch.empty(0, 48), 1):
        pytest.skip("not built")
    far, qkv, dout = (1 << 30) + 64, normal(4, 48), normal(4, 16, seed=1)
    memory = torch.from_file(str(tmp_path / "qkv"), shared=True, size=3 * far + 48 + 16)
    views = [memory.as_strided(tensor.shape, (far, 1), start).copy_(tensor) for tensor, start in ((qkv, 0), (dout, 48))]
    got = values(packed_attention, views[0], offsets([4]), 1, None, views[1])
    wanted = values(packed_attention, qkv, offsets([4]), 1, None, dout)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_gradients_only_where_needed(monkeypatch, dtype):
    calls, real = [], attention_cpu._Attention.backward
    monkeypatch.setattr(attention_cpu._Attention, "backward", lambda ctx, dout: (calls.append(1), real(ctx, dout))[1])
    qkv, factor = normal(9, 96, dtype=dtype), torch.ones(32, dtype=dtype, requires_grad=True)
    out = packed_attention(qkv, offsets([9]), 2)
    assert not out.requires_grad
    (out * factor).sum().backward()
    assert factor.grad is not None and not calls
    with torch.no_grad():
        assert not packed_attention(qkv.requires_grad_(), offsets([9]), 2).requires_grad


def test_what_it_does_not_take_plain_torch_does(monkeypatch):
    if not attention_cpu.fits(torch.empty(0, 48), 1):
        pytest.skip("not built")
    ran, real = [], attention_cpu.attention
    monkeypatch.setattr(attention_cpu, "attention", lambda *arguments: (ran.append(1), real(*arguments))[1])
    cu_seqlens = offsets([5, 2])

    def runs_here(columns, heads, dtype=torch.float32, lists=None):
        ran.clear()
        packed_attention(torch.ones(7, columns, dtype=dtype), cu_seqlens, heads, lists=lists)
        return bool(ran)

    lists = attention_lists(cu_seqlens, torch.ones(7, 32))
    assert isinstance(lists, Offsets) and lists.cu_seqlens is cu_seqlens
    assert runs_here(96, 2) and runs_here(96, 2, lists=lists) and runs_here(96, 2, torch.float16)
    assert not runs_here(24, 2) and not runs_here(24, 2, lists=lists) and not runs_here(96, 2, torch.float64)
    with pytest.raises(ValueError, match="must be those of cu_seqlens"):
        packed_attention(torch.ones(7, 96), cu_seqlens, 2, lists=Offsets(offsets([4, 3])))
    with pytest.raises(ValueError, match="ends at 7, more than the 6 rows"):
        packed_attention(torch.ones(6, 96), cu_seqlens, 2, lists=lists)
    with pytest.raises(ValueError, match="must end within the 6 rows"):
        attention_lists(cu_seqlens, torch.ones(6, 32))
    monkeypatch.setattr(attention_cpu, "_variants", lambda dtype: 0)
    assert isinstance(attention_lists(cu_seqlens, torch.ones(7, 32)), Buckets) and not runs_here(96, 2)


def raw_call() -> dict:
    dropout = dict(keys=torch.arange(9), threshold=torch.zeros(9, dtype=torch.int16), scale=torch.ones(9))
    return dict(qkv=torch.ones(10, 96), cu_seqlens=offsets([4, 5]), heads=2, **dropout, variant=0)


HOSTILE = {
    "columns that heads do not divide": (dict(heads=3), "a multiple of 16"),
    "heads of another width": (dict(heads=4), "a multiple of 16"),
    "no heads": (dict(heads=0), "heads above 0"),
    "-1 heads": (dict(heads=-1), "heads above 0"),
    "2^62 heads": (dict(heads=1 << 62), "a multiple of 16"),
    "no columns": (dict(qkv=torch.ones(10, 0)), "a multiple of 16"),
    "one dimension": (dict(qkv=torch.ones(960)), r"must be \[T, 3H\]"),
    "three dimensions": (dict(qkv=torch.ones(1, 10, 96)), r"must be \[T, 3H\]"),
    "fp64": (dict(qkv=torch.ones(10, 96).double()), "no such kernel"),
    "a variant that is not there": (dict(variant=9), "no such kernel"),
    "variant -1": (dict(variant=-1), "no such kernel"),
    "columns apart": (dict(qkv=torch.ones(10, 192)[:, ::2]), "qkv has another"),
    "one row for all": (dict(qkv=torch.ones(1, 96).expand(10, 96)), "qkv has another"),
    "rows an odd number apart": (dict(qkv=torch.ones(10, 97)[:, :96]), "qkv has another"),
    "offsets of more rows": (dict(cu_seqlens=offsets([4, 7])), "within the 10 rows"),
    "offsets that decrease": (dict(cu_seqlens=torch.tensor([0, 5, 4, 9]).int()), "not decrease"),
    "offsets from 1": (dict(cu_seqlens=torch.tensor([1, 5]).int()), "start at 0"),
    "offsets below 0": (dict(cu_seqlens=torch.tensor([0, -5, 4]).int()), "not decrease"),
    "offsets of int64": (dict(cu_seqlens=offsets([4, 5]).long()), "cu_seqlens has another"),
    "no offsets": (dict(cu_seqlens=offsets([])[:0]), r"must be \[S\+1\]"),
    "offsets apart": (dict(cu_seqlens=torch.zeros(6).int()[::2]), "cu_seqlens has another"),
    "too few keys": (dict(keys=torch.arange(8)), "belong together"),
    "too few thresholds": (dict(threshold=torch.zeros(8, dtype=torch.int16)), "belong together"),
    "too few scales": (dict(scale=torch.ones(8)), "belong together"),
    "no scale": (dict(scale=None), "belong together"),
    "only a scale": (dict(keys=None, threshold=None), "belong together"),
    "keys of int32": (dict(keys=torch.arange(9).int()), "keys has another"),
    "thresholds of int32": (dict(threshold=torch.zeros(9).int()), "threshold has another"),
    "scales of fp64": (dict(scale=torch.ones(9).double()), "scale has another"),
    "keys of two dimensions": (dict(keys=torch.zeros(9, 0).long()), "keys has another"),
}  # fmt: skip
BAD_GRADIENTS = {
    "of fewer rows": torch.ones(9, 32), "of fewer columns": torch.ones(10, 16), "in bf16": torch.ones(10, 32).bfloat16(),
    "expanded": torch.ones(1, 32).expand(10, 32), "of three dimensions": torch.ones(10, 32, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_the_operators_refuse(name):
    if not attention_cpu._loaded():
        pytest.skip("not built")
    change, message = HOSTILE[name]
    good = raw_call()
    assert torch.ops.kloss.cpu_attention(**good).shape == (10, 32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kloss.cpu_attention(**good | change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kloss.cpu_attention_backward(dout=torch.ones(10, 32), **good | change)


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_backward_refuses_a_gradient(name):
    if not attention_cpu._loaded():
        pytest.skip("not built")
    with pytest.raises(RuntimeError, match="dout has another"):
        torch.ops.kloss.cpu_attention_backward(dout=BAD_GRADIENTS[name], **raw_call())


def test_opcheck():
    if not attention_cpu._loaded():
        pytest.skip("not built")
    call = raw_call()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.kloss.cpu_attention.default, tuple(call.values()), test_utils=tests)
    torch.library.opcheck(torch.ops.kloss.cpu_attention_backward.default, (torch.ones(10, 32), *call.values()), test_utils=tests)
