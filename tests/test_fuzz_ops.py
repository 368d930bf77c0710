"""Random calls of the ops against fp64, and the same calls with one argument changed: a ValueError, or still the right value.

KLOSS_FUZZ=10 runs ten times as many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_no_worse, batches, fuzz_examples, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kloss import kernels
from kloss.kernels import Dropout, make_segments, reference, row_keys


class Case(NamedTuple):
    """A call of an op.

    run: of `kernels` or `reference`, and the arguments; returns the tensors to compare.
    arguments: by name.
    data: the arguments that the fp64 oracle gets in fp64.
    differentiable: in the data.
    """

    run: Callable[..., list[Tensor]]
    arguments: dict[str, Any]
    data: tuple[str, ...] = ()
    differentiable: bool = False

    def results(self, home: Any, dtype: torch.dtype | None = None, gradients: bool = False) -> list[Tensor]:
        """What the op of `home` gives. dtype: of the data; None: as it is. gradients: those of the first result, too."""
        own = dict(self.arguments)
        if home is reference:  # ops may write in place
            own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in own.items()}
        for name in self.data if dtype else ():
            own[name] = own[name].to(dtype)
        if not gradients:
            return self.run(home, **own)
        leaves = {name: own[name].detach().requires_grad_() for name in self.data}
        results = self.run(home, **own | leaves)
        if not results[0].requires_grad:  # nothing went in
            return results + [torch.zeros_like(leaf) for leaf in leaves.values()]
        weights = torch.arange(results[0].numel(), dtype=torch.float64).cos().view_as(results[0]).to(results[0].dtype)
        found = torch.autograd.grad(results[0], list(leaves.values()), weights, materialize_grads=True)
        return [result.detach() for result in results] + list(found)


def compare(results: list[Tensor], plain: list[Tensor], oracle: list[Tensor]) -> None:
    """The results are as good as the reference in its dtype; what is not finite stands where it should; integers are equal."""
    for got, same, right in zip(results, plain, oracle, strict=True):
        assert got.shape == right.shape
        if not got.is_floating_point():
            assert torch.equal(got, right)
            continue
        assert torch.equal(got.isfinite(), right.isfinite())
        if got.numel():
            sides = (torch.where(right.isfinite(), value, 0).to(value.dtype) for value in (got, same, right))
            assert_no_worse(*sides, torch.zeros(len(got)), floor=4)


def check(case: Case, gradients: bool = False) -> None:
    plain, oracle = (case.results(reference, dtype, gradients) for dtype in (None, torch.float64))
    compare(case.results(kernels, None, gradients), plain, oracle)


SEQUENCES = st.lists(st.one_of(st.integers(0, 3), st.sampled_from([8, 17, 33])), max_size=5)
LOW = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def owners(draw, lengths: list[int], adapters: int) -> Tensor:
    ids = st.lists(st.integers(-1, adapters - 1), min_size=len(lengths), max_size=len(lengths))
    return torch.tensor(draw(ids), dtype=torch.int32)


@st.composite
def linears(draw):
    shape = draw(batches(k=[20, 32], n=[24, 32])) | {"p": draw(st.sampled_from([0.0, 0.5]))}
    made = problem(**shape, dtype=draw(LOW))
    keywords, cu_seqlens, adapter = made.keywords, made.segments.cu_seqlens, made.segments.adapter
    dropout = keywords.pop("dropout", None)
    arguments = dict(zip(("x", "weight", "bias", "lora_a", "lora_b", "scaling"), made[:6], strict=True)) | keywords
    arguments |= {"cu_seqlens": cu_seqlens, "adapter": adapter, "exact": draw(st.booleans())}
    if dropout is not None:
        arguments |= {"p": dropout.p, "seed": dropout.seed, "row_key": dropout.row_key}

    def run(home, cu_seqlens, adapter, p=None, seed=None, row_key=None, **rest):
        segments = make_segments(cu_seqlens, adapter, shape["adapters"])
        dropout = None if p is None else Dropout(p, seed, row_key, 3)
        return [home.multi_lora_linear(segments=segments, dropout=dropout, **rest)]

    return Case(run, arguments, ("x", "weight", "bias", "lora_a", "lora_b"), True)


@st.composite
def attentions(draw):
    lengths, heads, seed = draw(SEQUENCES), draw(st.integers(1, 3)), draw(st.integers(0, 99))
    cu_seqlens, generator = offsets(lengths), torch.Generator().manual_seed(seed)
    rows = sum(lengths) + draw(st.integers(0, 2))
    qkv = torch.randn(rows, 3 * heads * draw(st.sampled_from([1, 4, 5])), generator=generator).to(draw(LOW))
    arguments = {"qkv": qkv, "cu_seqlens": cu_seqlens, "num_heads": heads}
    if draw(st.booleans()):
        numbers = torch.arange(len(lengths))
        keys = row_keys(numbers, numbers, cu_seqlens, rows=rows)
        owner = make_segments(cu_seqlens, owners(draw, lengths, 2), 2, rows=rows).row_adapter
        arguments |= {"p": torch.tensor([0.5, 0.1]), "seed": numbers.new_tensor([seed, 7]), "row_key": keys, "adapter": owner}

    def run(home, qkv, cu_seqlens, num_heads, p=None, seed=None, row_key=None, adapter=None):
        dropout = None if p is None else Dropout(p, seed, row_key, 3, adapter)
        return [home.packed_attention(qkv, cu_seqlens, num_heads, dropout=dropout)]

    return Case(run, arguments, ("qkv",), True)


@st.composite
def updates(draw):
    rows, width, seed = draw(st.integers(0, 4)), draw(st.integers(1, 40)), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)

    def numbers(*allowed):
        return draw(st.lists(st.sampled_from(allowed), min_size=rows, max_size=rows))

    state = torch.randn(3, rows, width + draw(st.integers(0, 3)), generator=generator)[:, :, :width]
    grad = torch.randn(rows, width, generator=generator) * 10 ** torch.tensor(numbers(-6.0, 0.0, 3.0))[:, None]
    arguments = {
        "param": state[0], "grad": grad.to(draw(LOW)), "exp_avg": state[1], "exp_avg_sq": state[2].square(),
        "step": torch.tensor(numbers(0, 1, 50, 10**6), dtype=torch.long), "lr": torch.tensor(numbers(0.0, 1e-4, 0.1)),
        "weight_decay": torch.tensor(numbers(0.0, 0.01, 1.0)), "max_norm": torch.tensor(numbers(1e-3, 1.0, torch.inf)),
        "active": torch.tensor(numbers(True, True, False), dtype=torch.bool),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.0)])),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
    }  # fmt: skip
    if draw(st.booleans()):
        arguments |= {"tail": draw(st.integers(0, width)), "tail_lr": torch.tensor(numbers(0.0, 1e-4, 0.1))}

    def run(home, param, grad, exp_avg, exp_avg_sq, step, **rest):
        norms = home.adapter_adamw_(param, grad, exp_avg, exp_avg_sq, step, **rest)
        return [param, exp_avg, exp_avg_sq, step, norms]

    return Case(run, arguments, ("param", "exp_avg", "exp_avg_sq"))


@st.composite
def losses(draw):
    lengths, classes, adapters = draw(SEQUENCES), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rows, generator = sum(lengths) + draw(st.integers(0, 2)), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    labels = torch.randint(-2, classes, (rows,), generator=generator)
    logits = torch.randn(rows, classes, generator=generator).to(draw(LOW))
    arguments = {"logits": logits, "labels": torch.where(labels < 0, -100, labels), "cu_seqlens": offsets(lengths)}

    def run(home, logits, labels, cu_seqlens, adapter):
        return list(home.token_loss(logits, labels, make_segments(cu_seqlens, adapter, adapters)))

    return Case(run, arguments | {"adapter": owners(draw, lengths, adapters)}, ("logits",), True)


@st.composite
def counts(draw):
    lengths, groups, generator = draw(SEQUENCES), draw(st.integers(1, 3)), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    rows = sum(lengths) + draw(st.integers(0, 2))
    pred, gold = torch.randint(0, 5, (2, rows), generator=generator)
    gold = torch.where(torch.rand(rows, generator=generator) < 0.2, -100, torch.where(gold > 2, pred, gold))
    group = owners(draw, lengths, groups).clamp(min=0)
    arguments = {"pred": pred, "gold": gold, "cu_seqlens": offsets(lengths), "group": group, "num_groups": groups}
    if draw(st.booleans()):
        arguments |= {"tags": torch.tensor([0, 1, 1, 2, 2]), "types": torch.tensor([-1, 0, 1, 1, 2])}
    return Case(lambda home, **arguments: [home.span_counts(**arguments)], arguments)


@st.composite
def embeddings(draw):
    # In rows of one or two numbers the norm leaves constants, whose gradients are differences of rounding.
    rows, width, words, first = (draw(st.integers(*ends)) for ends in ((0, 9), (5, 20), (1, 5), (0, 3)))
    generator, low = torch.Generator().manual_seed(draw(st.integers(0, 99))), draw(LOW)
    shapes = {"words": (words, width), "positions": (first + draw(st.integers(1, 4)), width)}
    shapes |= {name: (width,) for name in ("token_type", "weight", "bias")}
    tables = {name: torch.randn(*shape, generator=generator).to(low) for name, shape in shapes.items()}
    whole = draw(st.sampled_from([torch.int64, torch.int32]))
    arguments = {"input_ids": torch.randint(0, words, (rows,), generator=generator).to(whole)}
    arguments |= {"position": torch.randint(0, 6, (rows,), generator=generator), **tables, "eps": 1e-5, "first_position": first}
    if draw(st.booleans()):
        arguments |= {"p": torch.tensor([0.5]), "seed": torch.tensor([7]), "row_key": torch.arange(rows)}

    def run(home, p=None, seed=None, row_key=None, **rest):
        return [home.embed(**rest, dropout=None if p is None else Dropout(p, seed, row_key, 3))]

    return Case(run, arguments, tuple(tables), True)


def strided(tensor: Tensor) -> Tensor:
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


VALUES = (-1, -2, -100, 2, 9, 127, 2**31 - 1, 2**40, torch.nan)
TYPES = (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided,
    "transposed": lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else strided(tensor),
    "expanded": lambda tensor: tensor[:1].expand_as(tensor) if tensor.dim() and len(tensor) else tensor,
    "shorter": lambda tensor: tensor[:-1],
    "narrower": lambda tensor: tensor[..., :-1],
    "longer": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "wider": lambda tensor: torch.cat([tensor, tensor[..., :1]], -1),
    "with a dimension": lambda tensor: tensor[None],
    "flat": torch.Tensor.flatten,
    "empty": lambda tensor: tensor[:0],
    "one number": lambda tensor: tensor.new_zeros(()),
    "elsewhere": lambda tensor: tensor.to("meta"),
    **{f"of {dtype}": lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in TYPES},
}


@st.composite
def changed(draw, case: Case) -> Case:
    """The call with one of its tensors changed: its layout, shape, type, device or one value."""
    name = draw(st.sampled_from([name for name, value in case.arguments.items() if isinstance(value, Tensor)]))
    tensor = case.arguments[name]
    change = draw(st.sampled_from([*CHANGES, *VALUES]))
    if isinstance(change, str):
        tensor = CHANGES[change](tensor)
    elif tensor.numel() and (tensor.is_floating_point() or change == change):  # NaN is no integer
        limit = None if tensor.is_floating_point() or tensor.dtype == torch.bool else torch.iinfo(tensor.dtype)
        if limit is None or limit.min <= change <= limit.max:
            tensor = tensor.clone()
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = change
    return case._replace(arguments=case.arguments | {name: tensor})


def refused_or_right(case: Case) -> bool:
    """Whether the call is refused; one that is taken is checked. A refused one has changed no argument."""
    before = {name: value.clone() for name, value in case.arguments.items() if isinstance(value, Tensor)}
    try:
        case.results(kernels)
    except ValueError:
        for name, value in before.items():
            assert value.is_meta or torch.equal(value.nan_to_num(7), case.arguments[name].nan_to_num(7)), name
        return True
    check(case._replace(arguments=case.arguments | before))
    return False


@pytest.mark.parametrize(
    ("cases", "number"),
    [(linears, 100), (attentions, 50), (updates, 50), (losses, 50), (counts, 50), (embeddings, 50)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls_are_right_and_hostile_ones_are_refused_or_right(cases, number):
    refused = []

    @settings(max_examples=fuzz_examples(number), derandomize=True, database=None, deadline=None)
    @given(st.data())
    def run(data):
        case = data.draw(cases())
        hostile = data.draw(changed(case))
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in case.arguments.items()}
        check(case._replace(arguments=copies), case.differentiable)  # hostile shares the other tensors
        refused.append(refused_or_right(hostile))

    run()
    assert 0.1 < sum(refused) / len(refused) < 0.9  # both happen
