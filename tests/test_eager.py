"""What runs in plain torch against the specification, and what it promises about isolation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_as_good,
    assert_company_does_not_matter,
    assert_each_adapter_is_alone,
    assert_no_worse,
    batches,
    problem,
)
from hypothesis import given, settings
from test_reference import CASES, MIXED, Case, adapter_linear_case, attention_dropout
from torch import Tensor

import kloss.kernels as kernels
from kloss.kernels import (
    Dropout,
    adapter_linear,
    make_segments,
    packed_attention,
    reference,
    row_keys,
    token_loss,
)
from kloss.kernels.buckets import make_buckets

multi_lora_linear = partial(kernels.multi_lora_linear, backend="torch")
SHAPES = {
    "odd": dict(lengths=[5, 0, 1, 70, 3], adapter=[2, 1, 0, 2, -1], adapters=4, k=41, n=23, rank=8, behind=3),
    "in order": dict(lengths=[5, 30, 70], adapter=[0, 0, 2], adapters=4, k=32, n=48, rank=8, bias=False),
    "mixed ranks": dict(
        lengths=[3, 4, 67, 2, 9], adapter=[3, 1, 2, 0, 1], adapters=4, k=32, n=60, rank=64, slices=3, ranks=[1, 64, 17, 8]
    ),
    "nobody": dict(lengths=[4, 0], adapter=[-1, 1], adapters=2, k=16, n=16, rank=17),
    "several": dict(lengths=[150, 90, 110], adapter=[1, 0, 1], adapters=3, k=12, n=8, rank=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", SHAPES)
def test_multi_lora_linear_is_as_good_as_the_reference(name, p, exact, dtype):
    assert_as_good(multi_lora_linear, problem(**SHAPES[name], p=p, dtype=dtype), exact=exact)


@pytest.mark.parametrize("case", CASES)
def test_multi_lora_linear_equals_the_formula_in_fp64(case):
    runs, specified = Case(**CASES[case], op=multi_lora_linear), Case(**CASES[case])
    results = []
    for one in (runs, specified):
        leaves = one.leaves()
        y = one.run(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, one.dy, materialize_grads=True)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_multi_lora_linear_low_precision(dtype):
    case = Case(slices=3, ranks=MIXED, dtype=dtype, inputs=40, columns=24, op=multi_lora_linear)
    exact = Case(slices=3, ranks=MIXED, inputs=40, columns=24)
    for name in ("x", "weight", "bias", "a", "b", "dy"):
        setattr(exact, name, getattr(case, name).double())
    results = []
    for one in (case, exact):
        leaves = one.leaves()
        y = one.run(*leaves)
        assert y.dtype == one.x.dtype
        results.append([y.detach(), *torch.autograd.grad(y, leaves, one.dy)])
    # Every op rounds its result once; the longest chain rounds S, the LoRA term and the sum.
    for mine, wanted in zip(*results, strict=True):
        assert (mine.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


def test_empty_adapters_and_rank_tails_get_exact_zeros():
    case = Case(slices=3, ranks=MIXED, op=multi_lora_linear)
    leaves = case.leaves()
    case.run(*leaves).backward(case.dy)
    grad_a, grad_b = leaves[3].grad.view(4, 3, case.rank, -1), leaves[4].grad
    for g, rank in enumerate(MIXED):
        live = 0 if g == 1 else rank
        assert not grad_a[g, :, live:].any() and not grad_b[g, :, live:].any()
        assert g == 1 or (grad_a[g, :, :live] != 0).all() and (grad_b[g, :, :live] != 0).any()


def test_tails_are_skipped_not_multiplied_by_zero():
    case = Case(slices=3, ranks=MIXED, op=multi_lora_linear)
    wanted = case.run(case.x, case.weight, case.bias, case.a, case.b)
    for g, rank in enumerate(MIXED):
        case.a[g].view(3, case.rank, -1)[:, rank:] = torch.nan
        case.b[g, :, rank:] = torch.nan
    case.a[1], case.b[1] = torch.nan, torch.nan  # has no rows
    leaves = case.leaves()
    y = case.run(*leaves)
    y.backward(case.dy)
    assert torch.equal(y, wanted)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_rows_without_adapter_get_the_base_model():
    case = Case(op=multi_lora_linear)
    rest = F.pad(torch.repeat_interleave(case.adapter, case.cu_seqlens.diff()) < 0, (0, 2), value=True)
    y, base = case.run(case.x, case.weight, case.bias, case.a, case.b), F.linear(case.x, case.weight, case.bias)
    assert torch.equal(y[rest], base[rest]) and not torch.isclose(y[~rest], base[~rest]).all(1).any()


def lora_terms(
    parts: list[tuple[int, Tensor, Tensor]], a: Tensor, b: Tensor, ranks: Tensor, poison=(), exact=False
) -> dict[int, list]:
    """Runs sequences (adapter, x, dy) as one batch; what each adapter got: its rows of y and dx, its dA and dB.

    The base product takes part where it is exact; else the weight is zero, and only the LoRA terms are seen.
    """
    cu_seqlens = F.pad(torch.tensor([len(x) for _, x, _ in parts]).cumsum(0), (1, 0)).int()
    adapter = torch.tensor([g for g, _, _ in parts], dtype=torch.int32)
    seen: dict[int, int] = {}
    number = []
    for g, _, _ in parts:  # sequences are counted within the learner's batch
        number.append(seen.setdefault(g, 0))
        seen[g] += 1
    keys = row_keys(torch.full((len(parts),), 3), torch.tensor(number), cu_seqlens)
    adapters = len(a)
    dropout = Dropout(torch.full((adapters,), 0.5), torch.arange(adapters) * 17, keys, 4)
    a, b = a.clone(), b.clone()
    for g in poison:
        a[g], b[g] = torch.nan, torch.inf
    x = torch.cat([torch.full_like(x, torch.nan) if g in poison else x for g, x, _ in parts]).requires_grad_()
    dy = torch.cat([torch.full_like(dy, torch.nan) if g in poison else dy for g, _, dy in parts])
    a.requires_grad_(), b.requires_grad_()
    segments = make_segments(cu_seqlens, adapter, adapters)
    scaling = 1 + torch.arange(adapters) / 4
    weight = torch.zeros(b.shape[1], x.shape[1])
    if exact:
        weight.normal_(generator=torch.Generator().manual_seed(9))
    y = multi_lora_linear(x, weight, None, a, b, scaling, segments, slices=3, ranks=ranks, dropout=dropout, exact=exact)
    y.backward(dy)
    mine = {g: torch.repeat_interleave(adapter, cu_seqlens.diff()) == g for g in seen}
    return {g: [y.detach()[m], x.grad[m], a.grad[g], b.grad[g]] for g, m in mine.items()}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("inputs,columns,rank", [(24, 8, 4), (64, 33, 16), (129, 64, 17)])
def test_an_adapter_among_others_is_the_adapter_alone(inputs, columns, rank, exact):
    generator = torch.Generator().manual_seed(inputs)
    adapters = 5
    a = torch.randn(adapters, 3 * rank, inputs, generator=generator)
    b = torch.randn(adapters, 3 * columns, rank, generator=generator)
    ranks = torch.tensor([rank, 1, rank - 1, rank, 2])
    lengths = {0: (5, 1, 12), 1: (7,), 2: (3, 3), 3: (1,), 4: (9, 30)}
    parts = [
        (g, torch.randn(n, inputs, generator=generator), torch.randn(n, 3 * columns, generator=generator))
        for g, all_lengths in lengths.items() for n in all_lengths
    ]  # fmt: skip
    together = lora_terms(parts, a, b, ranks, exact=exact)
    order = torch.randperm(len(parts), generator=generator).tolist()
    order = [order[i] for i in torch.tensor([parts[k][0] for k in order]).argsort(stable=True)]
    order.sort(key=lambda k: (parts[k][0], k))  # each learner's own order stays, ...
    lanes = {g: [k for k in order if parts[k][0] == g] for g in lengths}
    mixed = [lanes[g].pop(0) for _ in range(3) for g in (3, 1, 4, 0, 2) if lanes[g]]  # ... others' is mixed in
    shuffled = lora_terms([parts[k] for k in mixed], a, b, ranks, exact=exact)
    poisoned = lora_terms([parts[k] for k in mixed], a, b, ranks, (1, 4), exact)
    for g in lengths:
        alone = lora_terms([part for part in parts if part[0] == g], a, b, ranks, exact=exact)[g]
        others = [together[g], shuffled[g]] + ([] if g in (1, 4) else [poisoned[g]])
        for result in others:
            for name, mine, wanted in zip(("y", "dx", "dA", "dB"), result, alone, strict=True):
                assert torch.isfinite(mine).all() and torch.equal(mine, wanted), (g, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_together_shuffled_and_beside_nan_to_the_bit(dtype):
    assert_company_does_not_matter(multi_lora_linear, k=27, n=24, rank=8, dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(shape=batches(k=[1, 20, 33], n=[1, 18, 70]))
def test_any_batch_is_each_adapter_alone(shape):
    assert_each_adapter_is_alone(multi_lora_linear, problem(**shape))


OFFSETS = torch.tensor([0, 3, 3, 12, 13, 30, 47], dtype=torch.int32)


def values_and_gradients(f, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """f's output and its gradients, in a dtype."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = f(*leaves)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_other_ops_are_as_good_as_the_reference(dropped, dtype):
    generator = torch.Generator().manual_seed(0)
    keys = attention_dropout(OFFSETS, [0, 1, -1, 1, 0, 0], 2) if dropped else None
    adapters = make_segments(OFFSETS, torch.tensor([2, 0, -1, 1, 2, 0], dtype=torch.int32), 4)
    owner = F.pad(adapters.row_adapter, (0, 2), value=-1)
    owner, whole = torch.where(owner < 0, 4, owner), torch.zeros(49)
    labels, ids = (torch.randint(0, end, (49,), generator=generator) for end in (5, 9))

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    calls = {
        "packed_attention": (lambda op, x: op(x, OFFSETS, 2, dropout=keys), [normal(49, 24)], [whole, whole]),
        "add_norm": (
            lambda op, *tensors: op(*tensors, 1e-5, dropout=keys), [normal(49, 8), normal(49, 8), normal(8), normal(8)],
            [owner, owner, owner, whole[:8], whole[:8]],
        ),
        "embed": (
            lambda op, *tables: op(ids, ids // 2, *tables, 1e-5, first_position=2, dropout=keys),
            [normal(9, 8), normal(5, 8), normal(8), normal(8), normal(8)], [owner, *(whole[:n] for n in (9, 5, 8, 8, 8))],
        ),
        "gelu": (lambda op, x: op(x), [normal(49, 8)], [owner, owner]),
        "adapter_linear": (
            lambda op, *tensors: op(*tensors, adapters), [normal(49, 8), normal(4, 5, 8), normal(4, 5)],
            [owner, owner, None, None],
        ),
        "token_loss": (lambda op, x: op(x, labels, adapters)[0], [normal(49, 5)], [None, owner]),
    }  # fmt: skip
    for name, (call, tensors, groups) in calls.items():
        runs, plain = (values_and_gradients(partial(call, getattr(home, name)), tensors, dtype) for home in (kernels, reference))
        oracle = values_and_gradients(partial(call, getattr(reference, name)), tensors, torch.float64)
        for mine, theirs, right, group in zip(runs, plain, oracle, groups, strict=True):
            assert_no_worse(mine, theirs, right, group)


def test_packed_attention_takes_lists_made_before():
    qkv, cu_seqlens = torch.randn(60, 12), torch.tensor([0, 3, 3, 30, 41, 58], dtype=torch.int32)
    buckets = make_buckets(cu_seqlens)
    assert [tuple(index.shape) for index, _ in buckets.blocks] == [(1, 8), (1, 16), (2, 32)]
    assert torch.equal(buckets.row_of_slot[buckets.slot_of_row], torch.arange(58)) and int(buckets.live.sum()) == 58
    assert torch.equal(packed_attention(qkv, cu_seqlens, 2, lists=buckets), packed_attention(qkv, cu_seqlens, 2))
    assert torch.equal(packed_attention(qkv, cu_seqlens.long(), 2, lists=buckets), packed_attention(qkv, cu_seqlens, 2))
    for lengths in ([0, 29, 58], [0, 3, 3, 30, 40, 58]):
        with pytest.raises(ValueError, match="lists"):
            packed_attention(qkv, cu_seqlens, 2, lists=make_buckets(torch.tensor(lengths, dtype=torch.int32)))


def test_packed_attention_without_rows():
    none = torch.tensor([0, 0], dtype=torch.int32)
    for op in (packed_attention, reference.packed_attention):
        assert op(torch.ones(0, 12), none, 2).shape == (0, 4)
        assert torch.equal(op(torch.ones(3, 12), none, 2), torch.zeros(3, 4))


@pytest.mark.parametrize("dropped", [False, True])
def test_packed_attention_keeps_a_nan_sequence_to_itself(dropped):
    cu_seqlens = torch.tensor([0, 5, 12, 18, 25], dtype=torch.int32)  # all of one bucket
    dropout = attention_dropout(cu_seqlens, [0, 1, 0, 1], 0) if dropped else None
    healthy = torch.randn(25, 24, generator=torch.Generator().manual_seed(0))
    sick = healthy.clone()
    sick[5:12] = torch.nan
    results = []
    for qkv in (healthy, sick):
        leaf = qkv.clone().requires_grad_()
        out = packed_attention(leaf, cu_seqlens, 2, dropout=dropout)
        results += [out.detach(), torch.autograd.grad(out, leaf, out.detach())[0]]
    others = torch.ones(25, dtype=torch.bool)
    others[5:12] = False
    assert results[2][~others].isnan().all()
    for mine, wanted in zip(results[2:], results[:2], strict=True):
        torch.testing.assert_close(mine[others], wanted[others])


def test_packed_attention_of_a_sequence_does_not_depend_on_the_others():
    cu_seqlens = torch.tensor([0, 6, 19, 26, 59], dtype=torch.int32)
    dropout = attention_dropout(cu_seqlens, [0, 1, 0, 1], 0)
    qkv = torch.randn(59, 24, generator=torch.Generator().manual_seed(0))
    together = packed_attention(qkv, cu_seqlens, 2, dropout=dropout)
    for first, last in ((0, 6), (6, 19), (19, 26), (26, 59)):
        own = dropout._replace(row_key=dropout.row_key[first:last], adapter=dropout.adapter[first:last])
        alone = packed_attention(qkv[first:last], torch.tensor([0, last - first], dtype=torch.int32), 2, dropout=own)
        torch.testing.assert_close(together[first:last], alone)


@pytest.mark.parametrize("adapter", [(2, 0, 0, -1, 2), (0, 0, 2, 2, -1)])
def test_adapter_linear(adapter):
    x, weight, bias, cu_seqlens = adapter_linear_case()
    segments = make_segments(cu_seqlens, torch.tensor(adapter, dtype=torch.int32), 3)
    torch.testing.assert_close(adapter_linear(x, weight, bias, segments), reference.adapter_linear(x, weight, bias, segments))
    assert torch.autograd.gradcheck(lambda *args: adapter_linear(*args, segments), (x, weight, bias))


def test_token_loss_keeps_a_nan_learner_to_itself():
    segments = make_segments(torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), 2)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, -100, 2, 3, 0])
    healthy = token_loss(logits, labels, segments)[0]
    sick = logits.clone()
    sick[3:] = torch.nan
    sick.requires_grad_()
    loss = token_loss(sick, labels, segments)[0]
    loss.sum().backward()
    assert loss[0] == healthy[0] and loss[1].isnan() and torch.isfinite(sick.grad[:3]).all()


@pytest.mark.parametrize("change", ["weight", "bias", "lora_a", "lora_b", "scaling", "x"])
def test_shapes_that_do_not_fit_are_named(change):
    case = Case(slices=3)
    tensors = {
        "x": case.x, "weight": case.weight, "bias": case.bias, "lora_a": case.a, "lora_b": case.b,
        "scaling": case.scaling, "segments": case.segments,
    }  # fmt: skip
    cut = {"x": case.x[:3], "bias": case.bias[:1], "lora_b": case.b[:2]}.get(change)
    tensors[change] = tensors[change][..., :-1] if cut is None else cut
    with pytest.raises(ValueError, match=f"^{change} "):
        kernels.multi_lora_linear(**tensors, slices=3)


def test_outputs_must_divide_into_the_slices():
    case = Case(columns=4)
    a, b = case.a.repeat(1, 3, 1), case.b
    with pytest.raises(ValueError, match="4 outputs do not divide into 3 slices"):
        kernels.multi_lora_linear(case.x, case.weight, None, a, b, case.scaling, case.segments, slices=3)
