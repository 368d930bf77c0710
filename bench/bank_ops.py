"""AdamW of a bank, span counts and work lists on a CPU, each beside what it replaces: `python -m bench.bank_ops --threads 1`.

Both sides take turns, and the fastest round of each counts: other programs only ever make a round slower.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kloss.kernels import make_segments, row_keys, shared_ops
from kloss.kernels.segments import with_work
from kloss.models.bank import TARGETS, _slots
from kloss.models.xlmr import XLMRConfig

BASE = XLMRConfig(num_labels=111)
SMALL = XLMRConfig(hidden_size=384, intermediate_size=1536, num_labels=111)
Pair = tuple[str, Callable[[], object], Callable[[], object]]


def optimisers(config: XLMRConfig, rank: int, adapters: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The bank's AdamW, and torch's fused one with an optimiser for each adapter; norms and clipping on both sides."""
    slots = _slots(config, TARGETS, rank, True)
    width = max(slot.start + math.prod(slot.shape) for slot in slots.values())

    def matrix(scale: float) -> Tensor:
        return shared_ops.huge_pages(torch.empty(adapters, width)).normal_().mul_(scale)

    param, grad, exp_avg, exp_avg_sq = matrix(0.02), matrix(1e-2), matrix(0), matrix(0)
    step, rate, one = torch.zeros(adapters, dtype=torch.int64), torch.full((adapters,), 1e-3), torch.ones(adapters)
    theirs = []
    for g in range(adapters):
        own = []
        for start, shape in slots.values():
            part = slice(start, start + math.prod(shape))
            own.append(torch.nn.Parameter(param[g, part].reshape(shape).clone()))
            own[-1].grad = grad[g, part].reshape(shape).clone()
        theirs.append((own, torch.optim.AdamW(own, lr=1e-3, weight_decay=0.01, fused=True)))

    def ours() -> None:
        shared_ops.adamw_(
            param, grad, exp_avg, exp_avg_sq, step, rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=one * 0.01,
            max_norm=one, active=one.bool(),
        )  # fmt: skip

    def per_adapter() -> None:
        for own, optimiser in theirs:
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimiser.step()

    return ours, per_adapter


def spans() -> tuple[Callable[[], object], Callable[[], object]]:
    """Span counts of 52 languages of 200 utterances, some 7 words and 20 subwords each, and seqeval's F1."""
    from seqeval.metrics import f1_score

    draw = torch.Generator().manual_seed(0)
    names = ["O", *(f"{tag}-{slot}" for slot in range(55) for tag in "BI")]
    sequences, words = [], []
    for _ in range(52 * 200):
        slot = torch.randint(0, 55, (), generator=draw)
        word = [0, 0, 1 + 2 * slot, 2 + 2 * slot, 0, 0, 0][: torch.randint(4, 8, (), generator=draw)] * 2
        word = [int(label) for label in word[: torch.randint(4, 12, (), generator=draw)]]
        words.append(word)
        sequences.append(
            [-100, *(label for w in word for label in (w, *[-100] * int(torch.randint(0, 4, (), generator=draw)))), -100]
        )
    gold = torch.tensor([label for sequence in sequences for label in sequence])
    wrong = torch.rand(gold.shape, generator=draw) < 0.2
    pred = torch.where(wrong, torch.randint(0, 111, gold.shape, generator=draw), gold.clamp(min=0))
    borders = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    group = torch.arange(52).repeat_interleave(200)
    tags, types = torch.tensor([0] + [1, 2] * 55), torch.tensor([0, *(slot for slot in range(55) for _ in "BI")])
    told = iter(pred[gold >= 0].tolist())
    theirs = [[names[next(told)] for _ in word] for word in words]
    truth = [[names[label] for label in word] for word in words]

    def ours() -> Tensor:
        return shared_ops.span_counts(pred, gold, borders, group, 52, tags=tags, types=types)

    def seqeval() -> list[float]:
        return [f1_score(truth[i : i + 200], theirs[i : i + 200]) for i in range(0, 52 * 200, 200)]

    counts = ours().double()
    torch.testing.assert_close(2 * counts[:, 0] / (counts[:, 1] + counts[:, 2]), torch.tensor(seqeval(), dtype=torch.double))
    return ours, seqeval


def lists(sequences: int, adapters: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The work lists and row keys of a batch, and torch's ops that make them."""
    draw = torch.Generator().manual_seed(0)
    cu = torch.cat([torch.zeros(1), torch.randint(4, 20, (sequences,), generator=draw).cumsum(0)]).int()
    owner = (torch.arange(sequences) * adapters // sequences).int()
    rows, step, number = int(cu[-1]), torch.arange(adapters), torch.arange(sequences) % 32
    return (
        lambda: shared_ops.work_lists(cu, owner, adapters, rows, step=step, sequence=number),
        lambda: (with_work(make_segments(cu, owner, adapters, rows=rows)), row_keys(step[owner.long()], number, cu, rows=rows)),
    )


def pairs() -> Iterator[Pair]:
    yield "AdamW, base r=32, 4 adapters, beside torch's fused one per adapter", *optimisers(BASE, 32, 4)
    yield "AdamW, e5-small r=8, 52 adapters, beside torch's fused one per adapter", *optimisers(SMALL, 8, 52)
    yield "span counts, 52 x 200 utterances, beside seqeval", *spans()
    yield "work lists, 1664 sequences of 52 adapters, beside torch's ops", *lists(1664, 52)
    yield "work lists, 8 sequences of one adapter, beside torch's ops", *lists(8, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    assert shared_ops.runs_on(torch.device("cpu")), "csrc is not built"
    for name, *sides in pairs():
        seconds: list[list[float]] = [[], []]
        for _ in range(arguments.rounds):
            for run, times in zip(sides, seconds, strict=True):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        ours, theirs = map(min, seconds)
        print(f"{name}: {ours * 1e3:.3f} ms, {theirs * 1e3:.3f} ms, {theirs / ours:.2f}x", flush=True)


if __name__ == "__main__":
    main()
