"""The specification against formulas written out row by row in fp64, and against what it promises about isolation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kloss.kernels import Dropout, make_buckets, make_segments, row_keys
from kloss.kernels.dropout import apply_dropout
from kloss.kernels.reference import (
    adapter_linear,
    add_norm,
    gelu,
    lora_linear,
    multi_lora_linear,
    packed_attention,
    token_loss,
)

WORD = 2**64 - 1


def scalar_keep(seed: int, row_key: int, site: int, feature: int, p: float) -> float:
    """What element `feature` of a row is multiplied by, 0 or 1 / (1 - p) in fp32: the formula in Python's integers."""

    def mix(z: int) -> int:
        z &= WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return z ^ (z >> 31)

    z = mix(mix(seed + (site + 1) * 0x9E3779B97F4A7C15) + row_key * 0xD1B54A32D192ED03)
    h = ((feature // 2) * 0x9E3779B1 & 0xFFFFFFFF) ^ (z & 0xFFFFFFFF)
    h ^= h >> 16
    h = h * 0x7FEB352D & 0xFFFFFFFF
    h ^= h >> 15
    h ^= z >> 32
    h = h * 0x846CA68B & 0xFFFFFFFF
    h ^= h >> 16
    u = h >> 16 if feature % 2 else h & 0xFFFF
    threshold = round(p * 65536)
    return 0.0 if u < threshold else float(torch.tensor(1 / (1 - threshold / 65536), dtype=torch.float32))


class Case:
    """A batch of random numbers: unsorted sequences, some without rows or adapter, rows behind the last offset."""

    def __init__(
        self, slices=1, ranks=None, lengths=(3, 0, 1, 2, 4, 1, 2), adapter=(2, 1, -1, 0, 2, 3, 0), p=0.5, behind=2,
        inputs=5, columns=3, rank=4, dtype=torch.float64,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        groups = 4

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        self.adapter = torch.tensor(adapter, dtype=torch.int32)
        self.segments = make_segments(self.cu_seqlens, self.adapter, groups)
        self.rows = int(self.cu_seqlens[-1]) + behind
        self.x, self.dy = normal(self.rows, inputs), normal(self.rows, slices * columns)
        self.weight, self.bias = normal(slices * columns, inputs), normal(slices * columns)
        self.a, self.b = normal(groups, slices * rank, inputs), normal(groups, slices * columns, rank)
        self.scaling = torch.tensor([0.5, 1.0, 2.0, 1.5])
        self.slices, self.rank = slices, rank
        self.ranks = None if ranks is None else torch.tensor(ranks)
        for g in range(groups if ranks else 0):
            self.a[g].view(slices, rank, inputs)[:, ranks[g] :] = 0
            self.b[g, :, ranks[g] :] = 0
        sequence = torch.arange(len(lengths))
        keys = row_keys(torch.full_like(sequence, 7), sequence, self.cu_seqlens)
        self.dropout = None
        if p is not None:
            chances = torch.tensor([p, 0.2, p / 2, 0.0])
            self.dropout = Dropout(chances, torch.tensor([11, 2**62, -5, 3]), F.pad(keys, (0, behind)), 9)

    def run(self, x, weight, bias, a, b) -> Tensor:
        return multi_lora_linear(
            x,
            weight,
            bias,
            a,
            b,
            self.scaling,
            self.segments,
            slices=self.slices,
            ranks=self.ranks,
            dropout=self.dropout,
        )

    def naive(self, x, weight, bias, a, b) -> Tensor:
        """Row by row, number by number where dropout is concerned; differentiable by torch."""
        owner = torch.repeat_interleave(self.adapter, self.cu_seqlens.diff()).tolist()
        columns, out = weight.shape[0] // self.slices, []
        for t, row in enumerate(x):
            y = weight @ row + bias
            g = owner[t] if t < len(owner) else -1
            if g >= 0:
                if self.dropout is not None:
                    keys = int(self.dropout.seed[g]), int(self.dropout.row_key[t]), self.dropout.site
                    p = float(self.dropout.p[g])
                    row = row * torch.tensor([scalar_keep(*keys, k, p) for k in range(len(row))], dtype=row.dtype)
                rank = self.rank if self.ranks is None else int(self.ranks[g])
                parts = []
                for i in range(self.slices):
                    a_i = a[g, i * self.rank : i * self.rank + rank]
                    parts.append(b[g, i * columns : (i + 1) * columns, :rank] @ (a_i @ row))
                y = y + float(self.scaling[g]) * torch.cat(parts)
            out.append(y)
        return torch.stack(out)

    def leaves(self) -> list[Tensor]:
        return [t.clone().requires_grad_() for t in (self.x, self.weight, self.bias, self.a, self.b)]


MIXED = (4, 1, 3, 2)
CASES = {
    "one slice": {},
    "three slices": {"slices": 3},
    "mixed ranks": {"slices": 3, "ranks": MIXED},
    "no dropout": {"slices": 3, "ranks": MIXED, "p": None},
    "in order": {"lengths": (2, 3, 0, 1, 2), "adapter": (0, 0, 1, 2, 3)},
    "in order, odd widths, no rows behind": {"lengths": (1, 5, 4), "adapter": (0, 3, -1), "inputs": 9, "behind": 0},
    "no adapter at all": {"lengths": (2, 1), "adapter": (-1, -1)},
    "no rows": {"lengths": (0, 0), "adapter": (1, 0), "behind": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_multi_lora_linear_equals_the_row_by_row_formula(case):
    case = Case(**CASES[case])
    results = []
    for f in (case.run, case.naive if case.rows else case.run):
        leaves = case.leaves()
        y = f(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, case.dy, materialize_grads=True)])
    for name, mine, wanted in zip(("y", "x", "weight", "bias", "lora_a", "lora_b"), *results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ["one slice", "mixed ranks", "no dropout", "in order"])
def test_multi_lora_linear_gradcheck(case):
    case = Case(**CASES[case])
    assert torch.autograd.gradcheck(case.run, case.leaves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_multi_lora_linear_low_precision(dtype):
    case = Case(slices=3, ranks=MIXED, dtype=dtype, inputs=40, columns=24)
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
    case = Case(slices=3, ranks=MIXED)
    leaves = case.leaves()
    case.run(*leaves).backward(case.dy)
    grad_a, grad_b = leaves[3].grad.view(4, 3, case.rank, -1), leaves[4].grad
    for g, rank in enumerate(MIXED):
        live = 0 if g == 1 else rank
        assert not grad_a[g, :, live:].any() and not grad_b[g, :, live:].any()
        assert g == 1 or (grad_a[g, :, :live] != 0).all() and (grad_b[g, :, :live] != 0).any()


def test_tails_are_skipped_not_multiplied_by_zero():
    case = Case(slices=3, ranks=MIXED)
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
    case = Case()
    owner = torch.repeat_interleave(case.adapter, case.cu_seqlens.diff())
    rest = torch.cat([owner < 0, torch.ones(2, dtype=torch.bool)])
    y = case.run(case.x, case.weight, case.bias, case.a, case.b)
    base = F.linear(case.x, case.weight, case.bias)
    assert torch.equal(y[rest], base[rest]) and not torch.isclose(y[~rest], base[~rest]).all(1).any()


def test_lora_linear_is_one_adapter_for_all_rows():
    generator = torch.Generator().manual_seed(1)
    x, weight, bias, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((6, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    dropout = Dropout(torch.tensor([0.5]), torch.tensor([3]), torch.arange(6), 2)

    def run(x, weight, bias, a, b):
        return lora_linear(x, weight, bias, a, b, 0.5, dropout=dropout)

    mask = torch.tensor([[scalar_keep(3, t, 2, k, 0.5) for k in range(5)] for t in range(6)], dtype=torch.float64)
    torch.testing.assert_close(run(x, weight, bias, a, b), x @ weight.T + bias + 0.5 * (x * mask) @ a.T @ b.T)
    assert torch.autograd.gradcheck(run, (x, weight, bias, a, b))
    torch.testing.assert_close(lora_linear(x, weight, None, a, b, torch.tensor([2.0])), x @ weight.T + 2 * x @ a.T @ b.T)


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
    groups = len(a)
    dropout = Dropout(torch.full((groups,), 0.5), torch.arange(groups) * 17, keys, 4)
    a, b = a.clone(), b.clone()
    for g in poison:
        a[g], b[g] = torch.nan, torch.inf
    x = torch.cat([torch.full_like(x, torch.nan) if g in poison else x for g, x, _ in parts]).requires_grad_()
    dy = torch.cat([torch.full_like(dy, torch.nan) if g in poison else dy for g, _, dy in parts])
    a.requires_grad_(), b.requires_grad_()
    segments = make_segments(cu_seqlens, adapter, groups)
    scaling = 1 + torch.arange(groups) / 4
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
    groups = 5
    a = torch.randn(groups, 3 * rank, inputs, generator=generator)
    b = torch.randn(groups, 3 * columns, rank, generator=generator)
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


def naive_attention(qkv: Tensor, cu_seqlens: Tensor, heads: int, *, dropout: Dropout | None) -> Tensor:
    width = qkv.shape[1] // 3
    size, out = width // heads, []
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for t in range(first, last):
            parts = []
            for h in range(heads):
                q, k, v = (qkv[:, i * width + h * size : i * width + (h + 1) * size] for i in range(3))
                p = torch.softmax(k[first:last] @ q[t] / math.sqrt(size), 0)
                if dropout is not None:
                    g = 0 if dropout.adapter is None else int(dropout.adapter[t])
                    keys = int(dropout.seed[g]), int(dropout.row_key[t]), dropout.site
                    chance = float(dropout.p[g]) if g >= 0 else 0.0
                    kept = [scalar_keep(*keys, h << 16 | j, chance) for j in range(last - first)]
                    p = p * torch.tensor(kept, dtype=p.dtype)
                parts.append(p @ v[first:last])
            out.append(torch.cat(parts))
    out += [qkv.new_zeros(width)] * (len(qkv) - int(cu_seqlens[-1]))
    return torch.stack(out)


def attention_dropout(cu_seqlens: Tensor, adapter: list[int] | None, behind: int) -> Dropout:
    sequence = torch.arange(len(cu_seqlens) - 1)
    keys = F.pad(row_keys(torch.full_like(sequence, 2), sequence, cu_seqlens), (0, behind))
    owner = None
    if adapter is not None:
        spread = torch.repeat_interleave(torch.tensor(adapter, dtype=torch.int32), cu_seqlens.diff())
        owner = F.pad(spread, (0, behind), value=-1)
    return Dropout(torch.tensor([0.5, 0.25]), torch.tensor([5, 6]), keys, 1, owner)


@pytest.mark.parametrize("adapter", [None, [0, 1, -1, 1, 0, 0]])
@pytest.mark.parametrize("dropped", [False, True])
def test_packed_attention_equals_the_formula(dropped, adapter):
    cu_seqlens = torch.tensor([0, 3, 3, 12, 13, 30, 47], dtype=torch.int32)
    behind = 2
    qkv = torch.randn(49, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dropout = attention_dropout(cu_seqlens, adapter, behind) if dropped else None
    d_out = torch.randn(49, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for f in (packed_attention, naive_attention):
        leaf = qkv.clone().requires_grad_()
        out = f(leaf, cu_seqlens, 2, dropout=dropout)
        results.append((out.detach(), torch.autograd.grad(out, leaf, d_out)[0]))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-13)
    assert not results[0][0][47:].any() and not results[0][1][47:].any()


@pytest.mark.parametrize("dropped", [False, True])
def test_packed_attention_gradcheck(dropped):
    cu_seqlens = torch.tensor([0, 2, 2, 11, 12], dtype=torch.int32)
    qkv = torch.randn(13, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dropout = attention_dropout(cu_seqlens, [0, 0, 1, -1], 1) if dropped else None
    assert torch.autograd.gradcheck(lambda x: packed_attention(x, cu_seqlens, 2, dropout=dropout), (qkv,))


def test_packed_attention_takes_buckets_made_before():
    qkv, cu_seqlens = torch.randn(60, 12), torch.tensor([0, 3, 3, 30, 41, 58], dtype=torch.int32)
    buckets = make_buckets(cu_seqlens)
    assert [tuple(part.shape) for part, _ in buckets.parts] == [(1, 8), (1, 16), (2, 32)]
    assert torch.equal(buckets.index[buckets.slot_of_row], torch.arange(58)) and int(buckets.live.sum()) == 58
    assert torch.equal(packed_attention(qkv, cu_seqlens, 2, buckets=buckets), packed_attention(qkv, cu_seqlens, 2))
    other = make_buckets(torch.tensor([0, 29, 58], dtype=torch.int32))
    assert not torch.equal(packed_attention(qkv, cu_seqlens, 2, buckets=other), packed_attention(qkv, cu_seqlens, 2))


def test_packed_attention_without_rows():
    none = torch.tensor([0, 0], dtype=torch.int32)
    assert packed_attention(torch.ones(0, 12), none, 2).shape == (0, 4)
    assert torch.equal(packed_attention(torch.ones(3, 12), none, 2), torch.zeros(3, 4))


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


def test_add_norm():
    generator = torch.Generator().manual_seed(0)
    x, residual, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((4, 6), (4, 6), (6,), (6,))
    )
    owner = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    dropout = Dropout(torch.tensor([0.5, 0.3]), torch.tensor([8, 9]), torch.tensor([1, 2, 3, 2**40]), 6, owner)
    rows = []
    for t in range(4):
        g = int(owner[t])
        keys = int(dropout.seed[g]), int(dropout.row_key[t]), 6
        kept = [scalar_keep(*keys, k, float(dropout.p[g])) if g >= 0 else 1.0 for k in range(6)]
        z = x[t] * torch.tensor(kept, dtype=torch.float64) + residual[t]
        rows.append((z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * weight + bias)
    torch.testing.assert_close(
        add_norm(x, residual, weight, bias, 1e-5, dropout=dropout), torch.stack(rows), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda *args: add_norm(*args, 1e-5, dropout=dropout), (x, residual, weight, bias))
    sick = x.detach().clone()
    sick[1] = torch.nan
    healthy = add_norm(x, residual, weight, bias, 1e-5, dropout=dropout)
    assert torch.equal(add_norm(sick, residual, weight, bias, 1e-5, dropout=dropout)[[0, 2, 3]], healthy[[0, 2, 3]])


def test_dropped_elements_are_selected_away_not_multiplied():
    dropout = Dropout(torch.tensor([0.5]), torch.tensor([1]), torch.arange(3), 0)
    x = torch.full((3, 8), torch.nan)
    kept = torch.tensor([[scalar_keep(1, t, 0, k, 0.5) > 0 for k in range(8)] for t in range(3)])
    assert torch.equal(apply_dropout(x, dropout).isnan(), kept) and 0 < kept.sum() < 24


def test_gelu_is_the_exact_form():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]).double())


def adapter_linear_case():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((9, 4), (3, 5, 4), (3, 5))
    )
    return x, weight, bias, torch.tensor([0, 2, 2, 5, 6, 8], dtype=torch.int32)


@pytest.mark.parametrize("adapter", [(2, 0, 0, -1, 2), (0, 0, 2, 2, -1)])
def test_adapter_linear(adapter):
    x, weight, bias, cu_seqlens = adapter_linear_case()
    adapter = torch.tensor(adapter, dtype=torch.int32)
    segments = make_segments(cu_seqlens, adapter, 3)
    owner = [*torch.repeat_interleave(adapter, cu_seqlens.diff()).tolist(), -1]
    wanted = torch.stack([weight[g] @ x[t] + bias[g] if g >= 0 else x.new_zeros(5) for t, g in enumerate(owner)])
    torch.testing.assert_close(adapter_linear(x, weight, bias, segments), wanted)
    assert torch.autograd.gradcheck(lambda *args: adapter_linear(*args, segments), (x, weight, bias))


def test_token_loss_is_each_learners_own_mean():
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 4, 6, 6, 9, 12, 13], dtype=torch.int32)
    adapter = torch.tensor([2, 0, 1, 2, -1, 3], dtype=torch.int32)
    segments = make_segments(cu_seqlens, adapter, 5)
    logits = torch.randn(15, 7, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 7, (15,), generator=generator)
    labels[[1, 5, 12]] = -100  # adapter 3 has one row, not labelled; 1 has a sequence without rows, 4 has none
    owner = torch.cat([torch.repeat_interleave(adapter, cu_seqlens.diff()), torch.tensor([-1, -1])])
    loss, count = token_loss(logits, labels, segments)
    wanted = torch.stack([
        F.cross_entropy(logits[owner == g], labels[owner == g]) if g in (0, 2) else torch.tensor(0.0)
        for g in range(5)
    ])  # fmt: skip
    assert count.tolist() == [1, 0, 6, 0, 0] and loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted.float())
    mine, theirs = (torch.autograd.grad(values.sum(), logits)[0] for values in (loss, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    assert not mine[(owner < 0) | (labels < 0)].any()


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
        multi_lora_linear(**tensors, slices=3)


def test_outputs_must_divide_into_the_slices():
    case = Case(columns=4)
    a, b = case.a.repeat(1, 3, 1), case.b
    with pytest.raises(ValueError, match="4 outputs do not divide into 3 slices"):
        multi_lora_linear(case.x, case.weight, None, a, b, case.scaling, case.segments, slices=3)
