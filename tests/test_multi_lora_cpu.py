"""The CPU's kernels of csrc against the reference, for every instruction set that this processor has."""

import shutil
from functools import partial

import pytest
import torch
from helpers import (
    LEAVES,
    assert_as_good,
    assert_company_does_not_matter,
    assert_each_adapter_is_alone,
    batches,
    outputs,
    problem,
)
from hypothesis import HealthCheck, given, settings

import kloss.kernels as kernels
from kloss.kernels import Dropout, cpu_library, make_segments, multi_lora, multi_lora_cpu
from kloss.kernels.dropout import keep_mask

multi_lora_linear = partial(kernels.multi_lora_linear, backend="csrc")

CASES = {
    "odd": dict(lengths=[5, 0, 1, 70, 3], adapter=[2, 1, 0, 2, -1], adapters=4, k=96, n=64, rank=8, behind=3),
    "one adapter": dict(lengths=[9, 60], adapter=[0, 0], adapters=1, k=32, n=32, rank=1, bias=False),
    "mixed ranks": dict(
        lengths=[3, 4, 67, 2, 9], adapter=[3, 1, 2, 0, 1], adapters=4, k=64, n=3 * 32, rank=64, slices=3, ranks=[1, 64, 17, 8]
    ),
    "odd rank": dict(lengths=[3, 9], adapter=[0, 1], adapters=2, k=32, n=160, rank=49, ranks=[49, 16]),
    "nobody": dict(lengths=[4, 0], adapter=[-1, 1], adapters=2, k=32, n=32, rank=17),
    "130 adapters": dict(lengths=[1, 0, 2] * 6, adapter=[i * 37 % 130 for i in range(18)], adapters=130, k=32, n=64, rank=17),
    "several blocks": dict(
        lengths=[300, 90, 400], adapter=[1, 0, 1], adapters=3, k=64, n=2 * 544, rank=33, slices=2, ranks=[33, 20, 1]
    ),
}  # fmt: skip
KINDS = [(torch.float32, 0), (torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 0), (torch.float16, 0)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{str(kind[0])[6:]}-{kind[1]}")
def dtype(request, monkeypatch):
    """An element type, with one variant of the code for it."""
    dtype, variant = request.param
    monkeypatch.setattr(multi_lora_cpu, "VARIANT", variant)
    if not multi_lora_cpu.fits(torch.empty(0, 32, dtype=dtype), torch.empty(32, 32), 1):
        pytest.skip("not built, or not for this processor")
    return dtype


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_built_where_there_is_a_compiler():
    assert multi_lora_cpu.built() and multi_lora_cpu.fits(torch.empty(1, 64), torch.empty(96, 64), 3)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, p, dtype):
    assert_as_good(multi_lora_linear, problem(**CASES[name], p=p, dtype=dtype))


def test_factors_of_rank_1_may_be_views(dtype):
    """Of a dimension of size 1 torch calls any stride contiguous."""
    case = problem([4, 9], [0, 1], adapters=2, k=32, n=64, rank=1, dtype=dtype)
    wanted = outputs(multi_lora_linear, case)
    a, b = case.lora_a.as_strided((2, 1, 32), (32, 1, 1)), case.lora_b.as_strided((2, 64, 1), (64, 1, 64))
    assert a.is_contiguous() and b.is_contiguous() and b.stride() != case.lora_b.stride()
    got = multi_lora_linear(case.x, case.weight, case.bias, a, b, case.scaling, case.segments, **case.keywords)
    assert torch.equal(got, wanted["y"])


def test_alone_together_shuffled_and_beside_nan_to_the_bit(dtype):
    assert_company_does_not_matter(multi_lora_linear, k=64, n=96, rank=8, dtype=dtype)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=batches(k=[32, 96], n=[32, 64]))
def test_any_batch_is_each_adapter_alone(dtype, shape):
    assert_each_adapter_is_alone(multi_lora_linear, problem(**shape, dtype=dtype))


def test_threads_do_not_change_a_bit(dtype):
    case, threads = problem(**CASES["several blocks"], p=0.5, dtype=dtype), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs(multi_lora_linear, case, grads=("lora_a", "lora_b")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], results[0][name]) for one in results for name in ("lora_a", "lora_b"))


def test_nothing_of_an_earlier_call_is_left(dtype):
    """Buffers are kept between calls: NaN of one lies where the next, whose rank is odd, has its padding."""
    sick = problem([50], [0], adapters=1, k=32, n=32, rank=8, dtype=dtype)
    sick.x.fill_(torch.nan), sick.dy.fill_(torch.nan)
    case, threads = problem([50], [0], adapters=1, k=32, n=32, rank=7, dtype=dtype), torch.get_num_threads()

    def sick_between(*arguments, **keywords):
        y = multi_lora_linear(*arguments, **keywords)
        outputs(multi_lora_linear, sick)
        return y

    try:
        torch.set_num_threads(1)
        outputs(multi_lora_linear, sick)
        got = outputs(sick_between, case)
    finally:
        torch.set_num_threads(threads)
    assert all(values.isfinite().all() for values in got.values())


def test_absent_adapters_and_rank_tails_get_zeros(dtype):
    """The tails and the absent adapters hold NaN, to show that nothing reads them."""
    shape = dict(adapters=4, k=32, n=96, rank=33, slices=3, ranks=[3, 33, 16, 33])
    case = problem([9, 66], [2, 0], **shape, p=0.5, dtype=dtype)
    tail = torch.arange(33) >= case.keywords["ranks"][:, None]
    tail[[1, 3]] = True
    sick = case._replace(
        lora_a=case.lora_a.unflatten(1, (3, 33)).masked_fill(tail[:, None, :, None], torch.nan).flatten(1, 2),
        lora_b=case.lora_b.masked_fill(tail[:, None, :], torch.nan),
        scaling=torch.where(tail.all(1), torch.nan, case.scaling),
    )
    got, clean = outputs(multi_lora_linear, sick), outputs(multi_lora_linear, case)
    assert not got["lora_a"].unflatten(1, (3, 33)).masked_select(tail[:, None, :, None]).count_nonzero()
    assert not got["lora_b"].masked_select(tail[:, None, :]).count_nonzero()
    assert all(torch.equal(got[name], clean[name]) for name in clean)


def test_the_mask_is_the_references(dtype):
    """With A and B the identity, y shows which elements were kept."""
    k, rows = 96, 9
    dropout = Dropout(torch.tensor([0.3, 0.5]), torch.tensor([-5, 1 << 40]), torch.arange(rows) * 65536 + 11, 7)
    part = make_segments(torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32), 2)
    x, eye = torch.ones(rows, k, dtype=dtype), torch.eye(k, dtype=dtype).expand(2, k, k)
    seen = multi_lora_linear(x, torch.zeros(k, k, dtype=dtype), None, eye, eye, torch.ones(2), part, dropout=dropout)
    keep, scale = keep_mask(dropout, torch.arange(k, dtype=torch.int32), part.row_adapter)
    assert torch.equal(seen, torch.where(keep, scale[:, None], 0.0).to(dtype))


def test_dropped_elements_are_selected_away(dtype):
    """A dropped element may hold anything: NaN in x does not reach dA, NaN in A does not reach its dx."""
    case = problem([70], [0], adapters=1, k=64, n=32, p=0.5, dtype=dtype)
    keep, _ = keep_mask(case.keywords["dropout"], torch.arange(64, dtype=torch.int32), torch.zeros(70, dtype=torch.int32))
    sick = case._replace(x=case.x.masked_fill(~keep, torch.nan))
    assert outputs(multi_lora_linear, sick, grads=("lora_a",))["lora_a"].isfinite().all()
    case.lora_a[:, :, 7] = torch.nan
    dx = outputs(multi_lora_linear, case, grads=("x",))["x"]
    assert torch.equal(dx[:, 7].isnan(), keep[:, 7]) and dx[:, :7].isfinite().all() and dx[:, 8:].isfinite().all()


def test_views_of_a_bank_and_other_strides(dtype):
    case = problem(**CASES["odd"], p=0.5, dtype=dtype)
    (g, rank, k), n = case.lora_a.shape, case.lora_b.shape[1]
    bank = torch.full((g, rank * (k + n) + 3), torch.nan, dtype=dtype)
    lora_a, lora_b = bank[:, : rank * k].view(g, rank, k), bank[:, rank * k : -3].view(g, n, rank)
    lora_a.copy_(case.lora_a), lora_b.copy_(case.lora_b)
    wide = torch.full((len(case.x), 2 * k), torch.nan, dtype=dtype)
    wide[:, ::2] = case.x
    strided = case._replace(
        x=wide[:, ::2], weight=case.weight.t().contiguous().t(), lora_a=lora_a, lora_b=lora_b, dy=case.dy.t().contiguous().t()
    )
    got, plain = outputs(multi_lora_linear, strided), outputs(multi_lora_linear, case)
    assert all(torch.equal(got[name], plain[name]) for name in ("lora_a", "lora_b"))
    torch.testing.assert_close(got, plain)
    turned = case._replace(lora_b=case.lora_b.transpose(1, 2).contiguous().transpose(1, 2))
    assert all(torch.equal(one, plain[name]) for name, one in outputs(multi_lora_linear, turned).items())


def test_an_input_may_start_at_an_odd_element(dtype):
    """A bf16 then lies at an address that four bytes at once may not be read from (`make sanitize` sees it)."""
    case = problem(**CASES["odd"], dtype=dtype)

    def shifted(tensor):
        moved = tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor)
        return moved.copy_(tensor)

    odd = outputs(multi_lora_linear, case._replace(x=shifted(case.x), dy=shifted(case.dy)))
    for name, tensor in outputs(multi_lora_linear, case).items():
        assert torch.equal(odd[name], tensor), name


def test_addresses_past_2_to_the_31(tmp_path):
    """The bank's rows lie 2^30 elements apart, so row 2 is past what 32 bits reach; the file behind them is sparse."""
    case = problem([3, 4], [2, 0], adapters=3, k=32, n=32)
    far, size = (1 << 30) + 64, case.lora_a[0].numel()
    memory = torch.from_file(str(tmp_path / "bank"), shared=True, size=2 * (far + size))
    views = []
    for start, values in ((0, case.lora_a), (size, case.lora_b)):
        view = memory.as_strided(values.shape, (far, values.stride(1), 1), start)
        view.copy_(values)
        views.append(view)
    got = outputs(multi_lora_linear, case._replace(lora_a=views[0], lora_b=views[1]), grads=("x",))
    plain = outputs(multi_lora_linear, case, grads=("x",))
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_rows_behind_the_last_offset_get_the_base_value(dtype):
    case = problem([5, 3], [0, 1], adapters=2, k=32, n=32, behind=4, dtype=dtype)
    case.x[8:] = torch.nan
    padded = make_segments(case.segments.cu_seqlens, case.segments.adapter, 2, rows=12)
    for part in (case.segments, padded):
        got = outputs(multi_lora_linear, case._replace(segments=part), grads=("x", "lora_a", "lora_b"))
        torch.testing.assert_close(got["x"][8:], case.dy[8:] @ case.weight)
        assert got["y"][8:].isnan().all() and got["y"][:8].isfinite().all()
        assert all(got[name].isfinite().all() for name in ("lora_a", "lora_b"))


def test_any_subset_may_require_gradients(dtype):
    case = problem([5, 30], [1, 0], adapters=2, k=32, n=64, p=0.5, dtype=dtype)
    full = outputs(multi_lora_linear, case)
    for subset in ((), ("x",), ("lora_a",), ("lora_b",), ("weight",), ("bias",), ("x", "lora_b"), ("lora_a", "weight")):
        got = outputs(multi_lora_linear, case, grads=subset)
        assert got.keys() == {"y", *subset}
        assert all(torch.equal(got[name], full[name]) for name in got)


def test_what_it_does_not_take_plain_torch_does(monkeypatch):
    ran, module = [], multi_lora.module_of
    monkeypatch.setattr(multi_lora.multi_lora_direct, "serves", lambda *_: False)
    monkeypatch.setattr(multi_lora, "module_of", lambda backend: (ran.append(backend), module(backend))[1])

    def backend(**shape):
        outputs(kernels.multi_lora_linear, problem([5], [0], adapters=1, **shape), grads=())
        return ran.pop()

    here = "csrc" if multi_lora_cpu.built() else "torch"
    assert backend(k=64, n=96) == backend(k=64, n=96, slices=3) == here
    assert backend(k=48, n=96) == backend(k=64, n=80) == backend(k=64, n=96, slices=2) == "torch"
    assert backend(k=64, n=96, dtype=torch.float64) == "torch"
    monkeypatch.setattr(multi_lora_cpu, "built", lambda: False)
    assert backend(k=64, n=96) == "torch"


@pytest.mark.parametrize("width", [20, 32], ids=["torch", "csrc"])
def test_autocast_runs_in_the_asked_dtype_backward_too(width):
    case = problem([5, 30], [1, 0], adapters=2, k=width, n=width, p=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(kernels.multi_lora_linear, case)
    rounded = [value.bfloat16() if name in LEAVES else value for name, value in case._asdict().items()]
    wanted = outputs(kernels.multi_lora_linear, type(case)(*rounded))
    assert got["y"].dtype == torch.bfloat16 and torch.equal(got["y"], wanted["y"])
    for name in LEAVES:
        assert got[name].dtype == torch.float32 and torch.equal(got[name].bfloat16(), wanted[name]), name


def test_the_operator_refuses_what_does_not_fit():
    if not multi_lora_cpu.built():
        pytest.skip("not built")
    x, a, b, y, s = (torch.zeros(shape) for shape in ((4, 32), (2, 8, 32), (2, 64, 8), (4, 64), (4, 8)))
    how = torch.ones(2), torch.arange(4), torch.tensor([2, 4, 4]), None, None, None
    op = torch.ops.kloss.cpu_lora_
    op(x, a, b, *how, 1, 0, y, s)
    for change, message in (
        ((x[:, :16].contiguous(), a, b, *how, 1, 0, y, s), "do not fit"),
        ((x, a, b, *how, 1, 0, y, s[:2]), "do not fit"),
        ((x, a, b, *how, 1, 0, y.half(), s), "y has another type"),
        ((x, a.transpose(1, 2), b, *how, 1, 0, y, s), "lora_a has another"),
        ((x, a, b, *how, 1, 9, y, s), "no such kernel"),
        ((x[:, :8].contiguous(), a[:, :, :8].contiguous(), b, *how, 1, 0, y, s), "multiples of 32"),
        ((x, a, b, how[0], how[1], how[2][:1], *how[3:], 1, 0, y, s), "do not fit"),
        ((x, a, b, how[0], torch.tensor([0, 1, 2, 4]), *how[2:], 1, 0, y, s), "order has a value outside 0..3"),
        ((x, a, b, how[0], torch.tensor([0, -1, 2, 3]), *how[2:], 1, 0, y, s), "order has a value outside 0..3"),
        ((x, a, b, *how[:2], torch.tensor([2, 5, 5]), *how[3:], 1, 0, y, s), "ends has a value outside 0..4"),
        ((x, a, b, *how[:2], torch.tensor([-(2**63), 4, 4]), *how[3:], 1, 0, y, s), "ends has a value outside 0..4"),
        ((x, a, b, *how[:2], torch.tensor([3, 2, 4]), *how[3:], 1, 0, y, s), "not decrease"),
        ((x, a, b, *how[:3], torch.tensor([8, 0]), *how[4:], 1, 0, y, s), "ranks has a value outside 1..8"),
        ((x, a, b, *how[:3], torch.tensor([9, 1]), *how[4:], 1, 0, y, s), "ranks has a value outside 1..8"),
        ((x, a, b, *how, 2**62, 0, y, s), "do not fit"),
        ((x, a, b[:, :0], *how, 1, 0, y[:, :0].contiguous(), s), "do not fit"),
        # A dimension of 0 at the end: sizes that fit, and no memory behind them.
        ((x.new_zeros(4, 32, 0), a, b, *how, 1, 0, y, s), "x has another"),
        ((x, a, b, *how, 1, 0, y.new_zeros(4, 64, 0), s), "y has another"),
        ((x, a, b, *how, 1, 0, y, s.new_zeros(4, 8, 0)), "s has another"),
        ((x, a, b, x.new_zeros(2, 0), *how[1:], 1, 0, y, s), "scaling_kept has another"),
        ((x, a, b, how[0], how[1].new_zeros(4, 0), *how[2:], 1, 0, y, s), "order has another"),
        ((x, a, b, *how[:2], how[2].new_zeros(3, 0), *how[3:], 1, 0, y, s), "ends has another"),
        ((x, a, b, *how[:3], how[2].new_zeros(2, 0), *how[4:], 1, 0, y, s), "ranks has another"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*change)


def test_a_library_of_another_version_says_so(monkeypatch):
    if not cpu_library.built():
        pytest.skip("not built")
    monkeypatch.setattr(cpu_library, "OPERATORS", ("cpu_lora_", "cpu_of_tomorrow"))
    with pytest.raises(ImportError, match="another version of csrc, without cpu_of_tomorrow; build it again"):
        cpu_library.built.__wrapped__()
