"""The specification against formulas written out row by row in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kloss.kernels as kernels
from kloss.kernels import Dropout, make_segments, reference, row_keys
from kloss.kernels.reference import (
    adapter_linear,
    add_norm,
    apply_dropout,
    gelu,
    lora_linear,
    multi_lora_linear,
    packed_attention,
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
        inputs=5, columns=3, rank=4, dtype=torch.float64, op=multi_lora_linear,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        adapters, self.op = 4, op

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        self.adapter = torch.tensor(adapter, dtype=torch.int32)
        self.segments = make_segments(self.cu_seqlens, self.adapter, adapters)
        self.rows = int(self.cu_seqlens[-1]) + behind
        self.x, self.dy = normal(self.rows, inputs), normal(self.rows, slices * columns)
        self.weight, self.bias = normal(slices * columns, inputs), normal(slices * columns)
        self.a, self.b = normal(adapters, slices * rank, inputs), normal(adapters, slices * columns, rank)
        self.scaling = torch.tensor([0.5, 1.0, 2.0, 1.5])
        self.slices, self.rank = slices, rank
        self.ranks = None if ranks is None else torch.tensor(ranks)
        for g in range(adapters if ranks else 0):
            self.a[g].view(slices, rank, inputs)[:, ranks[g] :] = 0
            self.b[g, :, ranks[g] :] = 0
        sequence = torch.arange(len(lengths))
        keys = row_keys(torch.full_like(sequence, 7), sequence, self.cu_seqlens)
        self.dropout = None
        if p is not None:
            chances = torch.tensor([p, 0.2, p / 2, 0.0])
            self.dropout = Dropout(chances, torch.tensor([11, 2**62, -5, 3]), F.pad(keys, (0, behind)), 9)

    def run(self, x, weight, bias, a, b) -> Tensor:
        keywords = {"slices": self.slices, "ranks": self.ranks, "dropout": self.dropout}
        return self.op(x, weight, bias, a, b, self.scaling, self.segments, **keywords)

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


@pytest.mark.parametrize("token_loss", [kernels.token_loss, reference.token_loss], ids=["runs", "reference"])
def test_token_loss_is_each_learners_own_mean(token_loss):
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
    assert count.tolist() == [1, 0, 6, 0, 0] and loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), wanted.float())
    mine, theirs = (torch.autograd.grad(values.sum(), logits)[0] for values in (loss, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    assert not mine[(owner < 0) | (labels < 0)].any()
