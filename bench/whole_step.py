"""A whole training step: all adapters together in kloss against peft, which takes them one at a time.

    python -m bench.whole_step [--layers 4] [--adapters 52] [--rank 32] [--utterances 4] [--dtype bf16] ...

Both sides do one step for every adapter: forward, loss, backward, clipping, AdamW. Weights, sentences and dropout probabilities
are the same. Ours is the trainer's step, packing included. peft runs a transformers model with SDPA attention and fused AdamW,
on a batch per adapter, padded beforehand to its longest sentence. Rounds alternate in one process; the ratio is the median over
rounds. A row is written only after both sides gave the same losses and gradient norms without dropout.
"""

import argparse
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from kloss.cl.corpus import IGNORED, Sentences
from kloss.cl.graphs import Graphs
from kloss.cl.learner import Learner
from kloss.cl.packing import PackedBatch, pack
from kloss.cl.step import StepSettings, train_step
from kloss.models import AdapterBank, XLMRConfig, XLMRForTokenClassification
from kloss.models.convert import to_transformers
from kloss.models.rows import BETAS, EPS

from .timing import ROOT, environment

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LR, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.01, 1.0


def massive_lengths(count: int, generator: torch.Generator) -> Tensor:
    """Token counts int64 [count] with `<s>` and `</s>`, distributed as MASSIVE's under XLM-R's tokenizer.

    A log-normal rounded and cut to 3..97 that matches the measured mean 11.6, median 11, p90 18, p99 28.
    """
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    return (math.log(10.7) + 0.41 * normal).exp().round().clamp(3, 97).long()


def make_sentences(config: XLMRConfig, count: int, generator: torch.Generator) -> Sentences:
    """Random tokens of MASSIVE's lengths; about two thirds of the inner tokens carry a label."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), massive_lengths(count, generator).cumsum(0)])
    total = int(offsets[-1])
    input_ids = torch.randint(4, config.vocab_size, (total,), generator=generator, dtype=torch.int32)
    labels = torch.randint(0, config.num_labels, (total,), generator=generator, dtype=torch.int32)
    labels[torch.rand(total, generator=generator) < 1 / 3] = IGNORED
    first, last = offsets[:-1], offsets[1:] - 1
    input_ids[first], input_ids[last] = 0, 2
    labels[first], labels[last] = IGNORED, IGNORED
    labels[first + 1] = 0
    return Sentences(input_ids.numpy(), labels.numpy(), offsets.numpy())


class TrainingStep(NamedTuple):
    """One step of all adapters, as the trainer takes it.

    batches: int64 [utterances] for each adapter, indices of the sentences that it trains on.
    """

    model: XLMRForTokenClassification
    bank: AdapterBank
    settings: StepSettings
    sentences: Sentences
    batches: list[np.ndarray]

    def run(self) -> tuple[Tensor, Tensor]:
        """Pack the sentences and train on them. Returns losses and gradient norms before clipping, fp32 [G] on the host."""
        loss, norms = train_step(self.model, self.bank, self.settings, [self.pack()])
        return loss.cpu(), norms.cpu()

    def pack(self, padded: bool = False) -> PackedBatch:
        """The batch of all adapters, on the host."""
        return pack([(self.sentences, index, g) for g, index in enumerate(self.batches)], len(self.batches), padded=padded)

    def by(self, graphs: Graphs) -> Callable[[], tuple[Tensor, Tensor]]:
        """`run` by graphs, where a call packs the next one's batch while the GPU computes, as the trainer does.

        It raises RuntimeError if the step could not be captured.
        """
        wanted, ahead = graphs.enabled, [self.pack(padded=True)]

        def call() -> tuple[Tensor, Tensor]:
            loss, norms = train_step(self.model, self.bank, self.settings, [ahead.pop()], graphs=graphs)
            if wanted and not graphs.enabled:
                raise RuntimeError("the step could not be captured")
            ahead.append(self.pack(padded=True))
            return loss.cpu(), norms.cpu()

        return call


def make_step(
    config: XLMRConfig, adapters: int, rank: int, utterances: int, *,
    dropout: float, dtype: torch.dtype, device: str = "cpu", seed: int = 0, model: XLMRForTokenClassification | None = None,
) -> TrainingStep:  # fmt: skip
    """A step on random sentences with random weights, which depend on the seed and dtype alone.

    utterances: of each adapter.
    dropout: of LoRA inputs, hidden states and attention.
    model: a backbone of this config with weights of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    sentences = make_sentences(config, adapters * utterances, generator)
    model = XLMRForTokenClassification.random(config, seed) if model is None else model
    model = model.freeze_backbone().to(device=device, dtype=dtype)
    bank = AdapterBank(model, adapters, rank, dtype=dtype, device=device)
    for name in bank.slots:
        if name.endswith(".b"):
            b = bank.view(bank.param, name)
            b.copy_(torch.empty(b.shape).normal_(0, 0.02, generator=generator))
    bank.refresh()
    learners = [
        Learner(
            (), rank, alpha=rank, lr=LR, seed=g, epochs=1, batch_size=utterances, lora_dropout=dropout, dropout=dropout,
            weight_decay=WEIGHT_DECAY, max_norm=MAX_NORM,
        ) for g in range(adapters)
    ]  # fmt: skip
    settings = StepSettings.of(learners, torch.device(device))
    return TrainingStep(model, bank, settings, sentences, list(np.arange(adapters * utterances).reshape(adapters, utterances)))


def pad(sentences: Sentences, index: Iterable[int], pad_id: int) -> dict[str, Tensor]:
    """Some sentences padded to the longest of them, as peft's model takes them: int64 [sentences, longest] each."""
    spans = [slice(*sentences.offsets[i : i + 2]) for i in index]

    def stack(values: np.ndarray, padding: int) -> Tensor:
        rows = [torch.from_numpy(values[span]).long() for span in spans]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

    input_ids, labels, _ = sentences
    mask = stack(np.ones_like(input_ids), 0)
    return {"input_ids": stack(input_ids, pad_id), "labels": stack(labels, IGNORED), "attention_mask": mask}


class PeftStep:
    """The baseline: peft's set_adapter, one padded batch and one AdamW per adapter. It starts from the weights of `ours`."""

    def __init__(self, ours: TrainingStep, dropout: float, autocast: bool, dtype: torch.dtype, count: int):
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        rank = ours.bank.rank
        lora = LoraConfig(
            task_type="TOKEN_CLS", r=rank, lora_alpha=rank, lora_dropout=dropout,
            target_modules=r".*\.layer\.\d+\..*(query|key|value|dense)", modules_to_save=["classifier"],
        )  # fmt: skip
        base = _transformers_model(ours.model, dropout).to(device=ours.bank.param.device, dtype=dtype)
        self.names = [f"a{g}" for g in range(count)]
        self.model = get_peft_model(base, lora, adapter_name=self.names[0], autocast_adapter_dtype=autocast)
        for name in self.names[1:]:
            self.model.add_adapter(name, lora, autocast_adapter_dtype=autocast)
        self.optimizers = []
        adamw = partial(torch.optim.AdamW, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
        for g, name in enumerate(self.names):
            tensors = {key: tensor.clone() for key, tensor in ours.bank._peft_tensors(g).items()}
            unexpected = set_peft_model_state_dict(self.model, tensors, adapter_name=name).unexpected_keys
            assert not unexpected, unexpected
            self.model.set_adapter(name)
            self.optimizers.append(adamw(self.trainable()))
        self.model.train()

    def trainable(self) -> list[Tensor]:
        """Parameters of the adapter in use."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def gradients(self, g: int, padded: dict[str, Tensor]) -> Tensor:
        """Gradients of adapter g; returns its loss."""
        self.model.set_adapter(self.names[g])
        loss = self.model(**padded).loss
        loss.backward()
        return loss.detach()

    def step(self, g: int, padded: dict[str, Tensor]) -> None:
        """One training step of adapter g."""
        self.gradients(g, padded)
        optimizer = self.optimizers[g]
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def losses_and_norms(self, padded: list[dict[str, Tensor]]) -> Tensor:
        """Losses and gradient norms of the first adapters, one for each of `padded`: fp32 [2, adapters]."""
        columns = []
        for g, inputs in enumerate(padded):
            loss = self.gradients(g, inputs)
            norm = torch.nn.utils.get_total_norm([parameter.grad.float() for parameter in self.trainable()])
            columns.append(torch.stack([loss.float(), norm]))
            self.model.zero_grad(set_to_none=True)
        return torch.stack(columns, 1)


def _transformers_model(model: XLMRForTokenClassification, dropout: float) -> torch.nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

    config = XLMRobertaConfig(
        **vars(model.config), hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, attn_implementation="sdpa"
    )
    with torch.device("meta"):
        theirs = XLMRobertaForTokenClassification(config)
    theirs.to_empty(device="cpu")
    missing = theirs.load_state_dict(to_transformers(model.state_dict(), config.num_hidden_layers), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    embeddings = theirs.roberta.embeddings
    embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)
    return theirs


def assert_no_worse(ours: Tensor, peer: Tensor, truth: Tensor, dtype: torch.dtype) -> list[float]:
    """Assert that our largest errors against fp32 are at most twice the peer's in dtype, plus rounding.

    ours, peer, truth: losses and gradient norms [2, adapters].
    Returns our largest relative errors: of the losses, of the norms.
    """
    error, allowed = ((side.double() - truth).abs().amax(1) / truth.amax(1).double() for side in (ours, peer))
    allowed = 2 * allowed + torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps
    assert (error <= allowed).all(), f"losses and gradient norms are off by {error.tolist()}, allowed {allowed.tolist()}"
    return error.tolist()


def check_step(config: XLMRConfig, rank: int, *, device: str, dtype: torch.dtype) -> None:
    """Check a small step with dropout on a device in dtype against the CPU in fp32. Raises AssertionError."""

    def losses_and_norms(device: str, dtype: torch.dtype) -> Tensor:
        return torch.stack(make_step(config, 4, rank, 4, dropout=0.1, device=device, dtype=dtype).run())

    truth = losses_and_norms("cpu", torch.float32)
    assert_no_worse(losses_and_norms(device, dtype), losses_and_norms("cpu", dtype), truth, dtype)


def compare(options: argparse.Namespace) -> dict:
    """Build both sides, check them against each other, time them in turns. Returns the row."""
    config = XLMRConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, intermediate_size=4 * options.hidden, num_labels=options.labels,
    )  # fmt: skip
    row = environment("cpu")  # of the code as it is now, whatever is edited while the clock runs
    dtype = DTYPES[options.dtype]
    count = min(options.peft_adapters or options.adapters, options.adapters)
    build = partial(make_step, config, options.adapters, options.rank, options.utterances, dtype=dtype, seed=options.seed)
    ours = build(dropout=0.0)
    padded = [pad(ours.sentences, index, config.pad_token_id) for index in ours.batches]
    checked = padded[: min(options.checked, count)]
    peer, truth = (PeftStep(ours, 0.0, False, kind, len(checked)).losses_and_norms(checked) for kind in (dtype, torch.float32))
    errors = assert_no_worse(torch.stack(ours.run())[:, : len(checked)], peer, truth, dtype)
    ours = build(dropout=options.dropout)
    sides = {
        f"{options.dtype}, autocast_adapter_dtype={cast}": PeftStep(ours, options.dropout, cast, dtype, count)
        for cast in ([True] if dtype == torch.float32 else [True, False])  # in fp32 both settings are the same
    }
    times: dict[str, list[float]] = {name: [] for name in ("ours", *sides)}

    def clock(name: str, warm_up: Callable[[], object], work: Callable[[], object], factor: float = 1.0) -> None:
        warm_up()  # not counted: the other side's turn has evicted this one's caches
        start = time.perf_counter()
        work()
        times[name].append((time.perf_counter() - start) * factor)

    def all_adapters(side: PeftStep) -> None:
        for g in range(count):
            side.step(g, padded[g])

    ours.run()
    for side in sides.values():
        side.step(0, padded[0])
    for turn in range(options.rounds):
        clock("ours", ours.run, ours.run)
        for name, side in sides.items():
            clock(name, partial(side.step, 0, padded[0]), partial(all_adapters, side), options.adapters / count)
        latest = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items())
        print(f"round {turn + 1}: {latest}", flush=True)
    best = min(sides, key=lambda name: statistics.median(times[name]))
    ratios = [theirs / mine for theirs, mine in zip(times[best], times["ours"], strict=True)]
    tokens = len(ours.sentences.input_ids)
    return row | {
        "case": "whole_step", "dtype": options.dtype, "dropout": options.dropout, "rounds": options.rounds,
        "shape": {
            "layers": options.layers, "hidden": options.hidden, "heads": options.heads, "adapters": options.adapters,
            "rank": options.rank, "utterances": options.utterances, "tokens": tokens,
            "padded_tokens": sum(batch["input_ids"].numel() for batch in padded), "vocabulary": options.vocabulary,
        },
        "seconds": quantiles(times["ours"]), "tokens_per_second": tokens / statistics.median(times["ours"]),
        "baseline": f"peft set_adapter, one adapter at a time ({best})", "baseline_adapters_timed": count,
        "baseline_seconds": {name: quantiles(times[name]) for name in sides},
        "ratio": quantiles(ratios), "gate_relative_error": dict(zip(("loss", "gradient_norm"), errors, strict=True)),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def wall(call: Callable[[], object]) -> float:
    """Microseconds of a call that waits for its own results."""
    began = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - began)


def ways_of_a_step(step: TrainingStep) -> dict[str, Callable[[], object]]:
    """Ways to run a whole training step -> a call that returns when its losses are on the host."""
    ways: dict[str, Callable[[], object]] = {"eager": step.run}
    device = step.bank.param.device
    if device.type == "cuda":
        from kloss.kernels import lora_hopper, lora_triton  # only here: they need Triton

        ways["replayed"] = step.by(Graphs(device))
        ways["replayed, one stream"] = mock.patch.object(lora_triton, "BESIDE", False)(step.by(Graphs(device)))
        ways["replayed, vendor's products"] = mock.patch.object(lora_hopper, "LEAST", 1 << 60)(step.by(Graphs(device)))
    return ways


def beside_peft(
    config: XLMRConfig, adapters: int, rank: int, utterances: int, *, device: str, dtype: torch.dtype, count: int = 2
) -> tuple[float, float, int]:
    """Check, then time a step of ours, the fastest way, and peft's of `count` adapters, scaled to all, its faster setting.

    Returns microseconds of ours and of peft's, and count.
    Raises AssertionError for losses or gradient norms that are off.
    """
    count = min(count, adapters)
    build = partial(make_step, config, adapters, rank, utterances, device=device, dtype=dtype)
    ours = build(dropout=0.0)
    padded = [
        {name: tensor.to(device) for name, tensor in pad(ours.sentences, index, config.pad_token_id).items()}
        for index in ours.batches[:count]
    ]
    peer, truth = (PeftStep(ours, 0.0, False, kind, count).losses_and_norms(padded).cpu() for kind in (dtype, torch.float32))
    assert_no_worse(torch.stack(ours.run())[:, :count], peer, truth, dtype)
    ours = build(dropout=0.1)
    mine = min(statistics.median([wall(call) for _ in range(8)][2:]) for call in ways_of_a_step(ours).values())
    theirs = []
    for autocast in (False, True):
        peft = PeftStep(ours, 0.1, autocast, dtype, count)

        def in_turn(peft: PeftStep = peft) -> None:
            for g, inputs in enumerate(padded):
                peft.step(g, inputs)
            if device == "cuda":
                torch.cuda.synchronize()

        theirs.append(statistics.median([wall(in_turn) for _ in range(4)][1:]) * adapters / count)
    return mine, min(theirs), count


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80, in the unit of the values."""
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in (20, 50, 80)}


def main(arguments: list[str] | None = None) -> dict:
    """Measure, append the row to the results, print a short table."""
    parser = argparse.ArgumentParser(prog="python -m bench.whole_step", description=(__doc__ or "").split("\n")[0])
    for name, value, text in (
        ("layers", 4, "encoder layers"), ("hidden", 768, "width of the model"), ("heads", 12, "attention heads"),
        ("vocabulary", 250_002, "rows of the embedding"), ("labels", 111, "width of the tagging heads"),
        ("adapters", 52, "adapters that train together"), ("rank", 32, "rank of every adapter"),
        ("utterances", 4, "utterances of each adapter"), ("rounds", 5, "timed rounds of each side"),
        ("peft-adapters", 0, "adapters that peft runs per round, its time scaled to all; 0: all of them"),
        ("checked", 4, "adapters compared before timing"), ("seed", 0, "of weights and data"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--dropout", type=float, default=0.1, help="of LoRA inputs, hidden states, attention")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/whole_step.jsonl", help="file that gets the row")
    options = parser.parse_args(arguments)
    row = compare(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['device']}, {row['dtype']}, dropout {row['dropout']}: {row['shape']}")
    for name, values in {"kloss, seconds": row["seconds"], **row["baseline_seconds"], "ratio": row["ratio"]}.items():
        print(f"  {name:45} " + "  ".join(f"{quantile} {value:8.3f}" for quantile, value in values.items()))
    return row


if __name__ == "__main__":
    main()
