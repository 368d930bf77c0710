"""What the ops refuse, the multi-adapter linear apart: each hostile call in another process, since a crash is one answer.

Run as a script this file makes the calls and prints what each came to as JSON. A fork makes them until one is not refused; the
next fork goes on behind it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch

from kloss.kernels import (
    Dropout,
    StepDropout,
    adapter_adamw_,
    adapter_linear,
    add_norm,
    apply_dropout,
    embed,
    lora_linear,
    make_segments,
    multi_lora_linear,
    packed_attention,
    row_keys,
    span_counts,
    token_loss,
)
from kloss.kernels.buckets import make_buckets

INT = dict(dtype=torch.int32)
CU = torch.tensor([0, 3, 3, 7], **INT)
OWNERS = torch.tensor([1, 0, 1], **INT)
KEYS = torch.arange(7)


class Call(NamedTuple):
    op: Callable
    arguments: dict


def adamw_call() -> Call:
    """Three rows of 40."""
    values = {"param": 1.0, "grad": 2.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}
    rows = {name: torch.full((3, 40), value) for name, value in values.items()}
    numbers = {"lr": 0.1, "tail_lr": 0.2, "weight_decay": 0.0, "max_norm": torch.inf}
    numbers = {name: torch.full((3,), value) for name, value in numbers.items()}
    flags = {"step": torch.ones(3, dtype=torch.long), "active": torch.ones(3, dtype=torch.bool)}
    return Call(adapter_adamw_, rows | numbers | flags | {"betas": (0.9, 0.999), "eps": 1e-8, "tail": 30})


def calls() -> dict[str, Call]:
    """A valid call of each op."""
    segments = make_segments(CU, OWNERS, 2)
    dropout = Dropout(torch.tensor([0.5, 0.1]), torch.arange(2), KEYS, 0, segments.row_adapter)
    x = torch.ones(8, 32)
    step = dict(
        hidden=dropout.p, attention=None, lora=None, seed=dropout.seed, row_key=KEYS, adapter=dropout.adapter, num_sites=3
    )
    ids = torch.tensor([1, 2, 0, 1, 0, 1, 2, 0])
    return {
        "adamw": adamw_call(),
        "attention": Call(packed_attention, dict(qkv=torch.ones(8, 24), cu_seqlens=CU, num_heads=2, dropout=dropout)),
        "bucketed": Call(packed_attention, dict(qkv=torch.ones(8, 24), cu_seqlens=CU, num_heads=2, lists=make_buckets(CU))),
        "buckets": Call(make_buckets, dict(cu_seqlens=CU)),
        "segments": Call(make_segments, dict(cu_seqlens=CU, adapter=OWNERS, num_adapters=2, rows=8)),
        "loss": Call(token_loss, dict(logits=torch.ones(8, 3), labels=ids, segments=segments)),
        "spans": Call(span_counts, dict(pred=ids, gold=ids.clone(), cu_seqlens=CU, group=OWNERS, num_groups=2,
                                        tags=torch.tensor([0, 1, 2]), types=torch.tensor([-1, 0, 0]))),
        "pairs": Call(span_counts, dict(pred=ids, gold=ids.clone(), cu_seqlens=CU, group=OWNERS, num_groups=2)),
        "head": Call(adapter_linear, dict(x=x, weight=torch.ones(2, 3, 32), bias=torch.ones(2, 3), segments=segments)),
        "norm": Call(add_norm, dict(x=x, residual=x, weight=x[0], bias=x[0], eps=1e-5)),
        "dropout": Call(apply_dropout, dict(x=x[:7], dropout=dropout)),
        "embed": Call(embed, dict(input_ids=ids[:7], position=ids[:7].int(), words=x[:3], positions=x[:4], token_type=x[0],
                                  weight=x[0], bias=x[0], eps=1e-5, first_position=2, dropout=dropout)),
        "step": Call(StepDropout, step),
        "keys": Call(row_keys, dict(step=torch.ones(3, dtype=torch.long), sequence=torch.arange(3), cu_seqlens=CU, rows=8)),
        "one lora": Call(lora_linear, dict(x=x, weight=torch.ones(32, 32), bias=None, lora_a=x[:4],
                                           lora_b=torch.ones(32, 4), scaling=1.0)),
        "loras": Call(multi_lora_linear, dict(x=x, weight=torch.ones(32, 32), bias=None, lora_a=torch.ones(2, 4, 32),
                                              lora_b=torch.ones(2, 32, 4), scaling=torch.ones(2), segments=segments)),
    }  # fmt: skip


def strided(tensor):
    """The same values with gaps between them."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def transposed(tensor):
    return tensor.t().contiguous().t()


def field(**changes):
    """Dropout's keys with fields changed."""
    return lambda dropout: dropout._replace(**{name: change(getattr(dropout, name)) for name, change in changes.items()})


def at(index, value):
    """The tensor with one value changed."""

    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


T = torch.Tensor
ANY_ROWS = {  # what is wrong with a matrix [3, 40]
    "of 20 columns": (lambda t: t[:, :20].contiguous(), r"has shape \(3, 20\), expected \(3, 40\)"),
    "of one column": (lambda t: t[:, :1].contiguous(), "has shape"),
    "of two rows": (lambda t: t[:2].contiguous(), "has shape"),
    "of one dimension": (lambda t: t.flatten(), "has shape"),
    "of another device": (lambda t: t.to("meta"), "is on meta"),
}
OWN_ROWS = {  # and with one that is written
    "in half": (T.half, "is of torch.float16, expected torch.float32"),
    "in double": (T.double, "is of torch.float64"),
    "with gaps": (strided, "contiguous rows"),
    "transposed": (transposed, "contiguous rows"),
    "of one row seen thrice": (lambda t: t[:1].expand(3, 40), "do not overlap"),
    "of rows that overlap": (lambda t: t.flatten().as_strided((3, 40), (10, 1)), "do not overlap"),
}
OFFSETS = {
    "start behind 0": (at(0, 1), "start at 0"),
    "start before 0": (at(0, -1), "start at 0"),
    "decrease": (at(1, 5), "not decrease"),
    "end behind the rows": (at(3, 9), "within the . rows there are, got 9|ends at 9"),
    "are huge": (at(3, 2**31 - 1), "got 2147483647|ends at 2147483647"),
    "are floats": (T.float, "cu_seqlens is of torch.float32"),
    "are flags": (T.bool, "cu_seqlens is of torch.bool"),
    "of two dimensions": (lambda t: t[None], "cu_seqlens has shape"),
    "are none": (lambda t: t[:0], "cu_seqlens has shape"),
}
HOSTILE = {  # (op, argument, what is wrong) -> change, message
    **{("adamw", name, text): fault for name in ("exp_avg", "exp_avg_sq", "grad") for text, fault in ANY_ROWS.items()},
    **{("adamw", name, text): fault for name in ("param", "exp_avg", "exp_avg_sq") for text, fault in OWN_ROWS.items()},
    ("adamw", "param", "of another device"): (lambda t: t.to("meta"), "is on cpu, expected meta"),
    ("adamw", "param", "without columns"): (lambda t: t[:, :0], r"expected \[G, P\]"),
    ("adamw", "grad", "in double"): (T.double, "grad is of torch.float64"),
    ("adamw", "grad", "of integers"): (T.int, "grad is of torch.int32"),
    **{("adamw", name, "without values"): (lambda t: t.to("meta"), "has no values")
       for name in ("step", "active", "lr", "max_norm")},
    ("adamw", "step", "below 0"): (at(2, -5), r"step\[2\] is -5"),
    ("adamw", "step", "in float"): (T.float, "step is of torch.float32"),
    ("adamw", "step", "too short"): (lambda t: t[:2], "step has shape"),
    ("adamw", "active", "in int"): (T.int, "active is of torch.int32"),
    ("adamw", "active", "too short"): (lambda t: t[:2], "active has shape"),
    ("adamw", "active", "too long"): (lambda t: t.repeat(2), "active has shape"),
    **{("adamw", name, f"{value}"): (at(2, value), rf"{name}\[2\] is {value}, expected a finite number, at least 0")
       for name in ("lr", "tail_lr", "weight_decay") for value in (torch.nan, torch.inf, -0.5)},
    **{("adamw", "max_norm", f"{value}"): (at(2, value), rf"max_norm\[2\] is {value}, expected a number above 0")
       for value in (torch.nan, 0.0, -1.0, -torch.inf)},
    **{("adamw", name, "too short"): (lambda t: t[:2], f"{name} has shape")
       for name in ("lr", "tail_lr", "weight_decay", "max_norm")},
    **{("adamw", "tail", f"{value}"): (lambda t, value=value: value, f"tail is {value}, expected") for value in (-1, 41, None)},
    **{("adamw", name, "of integers"): (T.int, f"{name} is of") for name in ("lr", "weight_decay", "max_norm")},
    **{("adamw", "betas", f"{value}"): (lambda b, value=value: (0.9, value), r"betas\[1\] is")
       for value in (1.0, -0.1, torch.nan)},
    **{("adamw", "eps", f"{value}"): (lambda e, value=value: value, "eps is") for value in (0.0, -1e-8, torch.nan, torch.inf)},
    **{(op, "cu_seqlens", text): fault
       for op in ("attention", "buckets", "segments", "spans", "keys") for text, fault in OFFSETS.items()
       if op != "buckets" or "end behind" not in text and "huge" not in text},
    ("attention", "qkv", "too few rows"): (lambda t: t[:5], "end within the 5 rows there are, got 7"),
    ("attention", "qkv", "of 23 columns"): (lambda t: t[:, :23], "23 columns"),
    ("attention", "qkv", "without columns"): (lambda t: t[:, :0], r"qkv has shape \(8, 0\)"),
    ("attention", "qkv", "of one dimension"): (lambda t: t[0], "qkv has shape"),
    ("attention", "qkv", "of three dimensions"): (lambda t: t[None], "qkv has shape"),
    ("attention", "qkv", "of integers"): (T.int, "qkv is of torch.int32"),
    ("attention", "qkv", "of another device"): (lambda t: t.to("meta"), "qkv is on meta"),
    **{("attention", "num_heads", f"{heads}"): (lambda n, heads=heads: heads, f"multiple of {heads} heads")
       for heads in (0, -2, 3)},
    ("bucketed", "lists", "of other offsets"): (lambda b: make_buckets(at(1, 2)(CU)), "must be those of cu_seqlens"),
    ("bucketed", "lists", "of fewer sequences"): (lambda b: make_buckets(CU[:2]), "lists.cu_seqlens has shape"),
    ("bucketed", "lists", "of more rows"): (lambda b: make_buckets(at(3, 9)(CU)), "must be those of cu_seqlens"),
    **{(op, "dropout", text): fault for op in ("attention", "dropout", "embed") for text, fault in {
        "with keys for fewer rows": (field(row_key=lambda k: k[:6], adapter=lambda a: a[:6]), "row_key has 6 entries"),
        "with float keys": (field(row_key=T.float), "dropout.row_key is of"),
        "with keys of two dimensions": (field(row_key=lambda k: k[None]), "dropout.row_key has shape"),
        "with p of 1": (field(p=at(0, 1.0)), r"dropout.p\[0\] is .*, expected a number in \[0, 1\)"),
        "with p below 0": (field(p=at(0, -0.1)), r"dropout.p\[0\] is .*, expected a number in \[0, 1\)"),
        "with p not a number": (field(p=at(0, torch.nan)), r"dropout.p\[0\] is .*, expected a number in \[0, 1\)"),
        "with p in double": (field(p=T.double), "dropout.p is of"),
        "with too few seeds": (field(seed=lambda s: s[:1]), "dropout.seed has shape"),
        "with float seeds": (field(seed=T.float), "dropout.seed is of"),
        "with an adapter that is not there": (field(adapter=at(1, 2)), "adapter must lie in"),
        "with adapter -2": (field(adapter=at(1, -2)), "adapter must lie in"),
        "with too few adapters": (field(adapter=lambda a: a[:3]), "dropout.adapter has shape"),
    }.items()},
    ("dropout", "x", "with more rows than keys"): (lambda x: torch.ones(8, 32), "7 entries for 8 rows"),
    ("dropout", "x", "with one row"): (lambda x: x[:1], "7 entries for 1 rows"),
    ("step", "hidden", "of 1"): (at(0, 1.0), r"dropout.p\[0\] is .*, expected a number in \[0, 1\)"),
    ("step", "adapter", "not there"): (at(0, 2), "adapter must lie in"),
    ("step", "adapter", "-2"): (at(0, -2), "adapter must lie in"),
    ("step", "seed", "too few"): (lambda s: s[:1], "seed has shape"),
    ("step", "row_key", "too few"): (lambda k: k[:3], "adapter has shape"),
    ("segments", "adapter", "of floats"): (T.float, "adapter is of torch.float32"),
    ("segments", "adapter", "of flags"): (T.bool, "adapter is of torch.bool"),
    ("segments", "adapter", "not there"): (at(1, 2), r"adapter ids must lie in \[-1, 2\), got 1..2"),
    ("segments", "adapter", "-2"): (at(1, -2), "adapter ids must lie in"),
    ("segments", "adapter", "that wraps to 0"): (lambda t: at(1, 2**32)(t.long()), "adapter ids must lie in"),
    ("segments", "adapter", "too few"): (lambda t: t[:2], "adapter has shape"),
    ("segments", "adapter", "of two dimensions"): (lambda t: t[:, None], "adapter has shape"),
    ("segments", "num_adapters", "-1"): (lambda n: -1, "at least 0"),
    ("segments", "rows", "-1"): (lambda n: -1, "at least 0"),
    ("loss", "labels", "above the classes"): (at(2, 3), r"labels must lie in \[0, 3\) or be -100, got 0..3"),
    ("loss", "labels", "-1"): (at(2, -1), "labels must lie in"),
    ("loss", "labels", "of floats"): (T.float, "labels is of"),
    ("loss", "labels", "in int32"): (T.int, "labels is of torch.int32"),
    ("loss", "labels", "too few"): (lambda t: t[:7], "labels has shape"),
    ("loss", "logits", "of too few rows"): (lambda t: t[:6], "labels has shape|logits has 6 rows"),
    ("loss", "logits", "without classes"): (lambda t: t[:, :0], "logits has shape"),
    ("loss", "logits", "of integers"): (T.int, "logits is of"),
    ("spans", "pred", "above the labels"): (at(1, 3), r"pred must lie in \[0, 3\), got 0..3"),
    ("spans", "pred", "-100"): (at(1, -100), "pred must lie in"),
    ("spans", "gold", "above the labels"): (at(1, 3), "gold must lie in"),
    ("spans", "gold", "-1"): (at(1, -1), "gold must lie in .* or be -100, got -1..2"),
    ("pairs", "pred", "-100"): (at(1, -100), "pred must lie in"),
    ("spans", "pred", "of floats"): (T.float, "pred is of"),
    ("spans", "pred", "too few"): (lambda t: t[:7], "pred has shape"),
    ("spans", "gold", "of two dimensions"): (lambda t: t[None], "gold has shape"),
    ("spans", "group", "above the groups"): (at(1, 2), r"group must lie in \[0, 2\)"),
    ("spans", "group", "-1"): (at(1, -1), "group must lie in"),
    ("spans", "group", "of floats"): (T.float, "group is of"),
    ("spans", "group", "too few"): (lambda t: t[:2], "group has shape"),
    ("spans", "num_groups", "-1"): (lambda n: -1, "at least 0"),
    ("spans", "tags", "alone"): (lambda t: None, "together or not at all"),
    ("spans", "tags", "of 3"): (at(1, 3), "tags must lie in"),
    ("spans", "tags", "too few"): (lambda t: t[:2], "types has shape"),
    ("head", "x", "of another width"): (lambda t: t[:, :31], r"x has shape \(8, 31\), expected \(8, 32\)"),
    ("head", "x", "of too few rows"): (lambda t: t[:6], "x has 6 rows, the segments cover 7"),
    ("head", "weight", "of one adapter"): (lambda t: t[:1], "weight has shape"),
    ("head", "weight", "in half"): (T.half, "weight is of"),
    ("head", "bias", "of another width"): (lambda t: t[:, :2], "bias has shape"),
    ("head", "bias", "in double"): (T.double, "bias is of"),
    ("norm", "residual", "of one row"): (lambda t: t[:1], "residual has shape"),
    ("norm", "residual", "in double"): (T.double, "residual is of"),
    ("norm", "weight", "of another width"): (lambda t: t[:31], "weight has shape"),
    ("norm", "bias", "of one value"): (lambda t: t[:1], "bias has shape"),
    ("embed", "input_ids", "above the words"): (at(2, 3), r"input_ids must lie in \[0, 3\), got 0..3"),
    ("embed", "input_ids", "-1"): (at(2, -1), "input_ids must lie in"),
    ("embed", "input_ids", "of floats"): (T.float, "input_ids is of torch.float32"),
    ("embed", "input_ids", "of two dimensions"): (lambda t: t[None], "input_ids has shape"),
    ("embed", "input_ids", "too few"): (lambda t: t[:6], "position has shape"),
    ("embed", "position", "-1"): (at(2, -1), "position must lie in"),
    ("embed", "position", "of floats"): (T.float, "position is of"),
    ("embed", "words", "of one dimension"): (lambda t: t[0], "words has shape"),
    ("embed", "words", "of another width"): (lambda t: t[:, :31], "positions has shape"),
    ("embed", "words", "of another device"): (lambda t: t.to("meta"), "words is on meta"),
    ("embed", "positions", "in half"): (T.half, "positions is of torch.float16"),
    ("embed", "positions", "of two rows"): (lambda t: t[:2], "first_position must be one of the 2 rows of positions, got 2"),
    ("embed", "token_type", "of two rows"): (lambda t: t.expand(2, 32), "token_type has shape"),
    ("embed", "weight", "of one value"): (lambda t: t[:1], "weight has shape"),
    ("embed", "bias", "of another width"): (lambda t: t[:31], "bias has shape"),
    ("embed", "weight", "in double"): (T.double, "weight is of torch.float64, expected torch.float32"),
    ("embed", "bias", "in half"): (T.half, "bias is of torch.float16, expected torch.float32"),
    ("embed", "first_position", "-1"): (lambda n: -1, "first_position must be"),
    ("keys", "step", "below 0"): (at(0, -1), "step must lie in"),
    ("keys", "step", "of 2^31"): (at(0, 2**31), "step must lie in"),
    ("keys", "sequence", "of 2^16"): (at(0, 2**16), "sequence must lie in"),
    ("keys", "sequence", "too few"): (lambda t: t[:2], "sequence has shape"),
    ("keys", "sequence", "of floats"): (T.float, "sequence is of"),
    ("one lora", "x", "of one dimension"): (lambda t: t[0], r"expected x \[T, K\]"),
    ("one lora", "scaling", "of two"): (lambda s: torch.ones(2), "one scaling"),
    ("one lora", "lora_a", "of one dimension"): (lambda t: t[0], "lora_a has shape"),
    **{("loras", "ranks", f"{values}"): (lambda n, values=values: torch.tensor(values), "ranks must lie in 1..4")
       for values in ([0, 4], [4, 5], [-1, 4], [4, 4096], [4, 2**40])},
}  # fmt: skip
INSIDES = {  # segments changed by hand: refused by whatever meets them, in its own words
    "order behind x": lambda s: s._replace(order=s.order + 10**6),
    "order before x": lambda s: s._replace(order=s.order - 10**6),
    "ends behind the rows": lambda s: s._replace(ends=s.ends + 10**6, runs=None),
    "ends that decrease": lambda s: s._replace(ends=s.ends.flip(0), runs=None),
    "ends too few": lambda s: s._replace(ends=s.ends[:1], runs=None),
}


def answer(op: str, name: str, change: Callable) -> str:
    """What an op says to a call with one argument changed; for a row that moved, that."""
    call = calls()[op]
    before = {key: value.clone() for key, value in call.arguments.items() if isinstance(value, T)}
    try:
        call.op(**call.arguments | {name: change(call.arguments.get(name))})
    except Exception as error:  # the test looks at which
        moved = [key for key, value in before.items() if not torch.equal(value, call.arguments[key])]
        return f"{type(error).__name__}: {error}" + (f" after {moved} moved" if moved else "")
    return "no error"


def in_forks(questions: dict[str, Callable[[], str]]) -> dict[str, str]:
    """The answers, each text or how its process ended. One process answers until it takes a call or dies; the next goes on."""
    answers = {}
    while len(answers) < len(questions):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            for ask in list(questions.values())[len(answers) :]:
                text = ask()
                os.write(write, text.encode() + b"\0")
                if not text.startswith("ValueError"):
                    break
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            texts = pipe.read().decode().split("\0")[:-1]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts += [f"ended with status {status}"] * (status != 0)
        answers |= zip(list(questions)[len(answers) :], texts, strict=False)
    return answers


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What each hostile call came to."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-P", __file__], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("op", calls())
def test_the_calls_that_are_changed_are_valid(op):
    call = calls()[op]
    call.op(**call.arguments)


@pytest.mark.parametrize("case", HOSTILE, ids=" ".join)
def test_a_hostile_call_is_refused_by_name_and_nothing_moves(case, answers):
    got = answers[" ".join(case)]
    assert re.fullmatch(rf"ValueError: .*({HOSTILE[case][1]}).*", got) and "moved" not in got, got


@pytest.mark.parametrize("name", INSIDES)
@pytest.mark.parametrize("op", ["loras", "head", "loss"])
def test_no_segments_made_by_hand_reach_foreign_memory(op, name, answers):
    assert answers[f"{op} segments with {name}"].split(":")[0] in ("ValueError", "RuntimeError", "IndexError", "no error")


if __name__ == "__main__":
    torch.set_num_threads(1)
    questions = {" ".join(case): partial(answer, case[0], case[1], change) for case, (change, _) in HOSTILE.items()}
    for name, change in INSIDES.items():
        questions |= {f"{op} segments with {name}": partial(answer, op, "segments", change) for op in ("loras", "head", "loss")}
    print(json.dumps(in_forks(questions)))
