"""A whole training step: all adapters together in kloss against peft, which takes them one at a time.

    python -m bench.whole_step [--layers 4] [--adapters 52] [--rank 32] [--utterances 4] [--dtype bf16] ...

Both sides do one step for every adapter: forward, loss, backward, clipping, AdamW; same weights, same sequences, same
dropout probabilities. peft runs a transformers model, SDPA attention, a batch per adapter padded to its longest
sequence, gradients for the adapter alone, fused AdamW. Rounds alternate in one process and the ratio is the median over
rounds. A row is appended to the results only after both sides gave the same losses and gradient norms without dropout.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kloss.kernels import adapter_adamw_, make_segments, row_keys, token_loss
from kloss.models import AdapterBank, StepDropout, XLMRConfig, XLMRForTokenClassification
from kloss.models.convert import to_transformers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RATE, DECAY, CLIP, BETAS, EPS = 1e-4, 0.01, 1.0, (0.9, 0.999), 1e-8
RESULTS = Path(__file__).parent / "results"


class Batch(NamedTuple):
    """The sequences of one step: input_ids int64 [T], labels int64 [T], cu_seqlens int32 [S+1], adapter int32 [S]."""

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    adapter: Tensor


class Padded(NamedTuple):
    """One adapter's sequences as peft takes them: input_ids, labels, attention_mask, int64 [utterances, longest]."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor


def massive_lengths(count: int, generator: torch.Generator) -> Tensor:
    """Token counts int64 [count] with `<s>` and `</s>`, distributed as MASSIVE's under XLM-R's tokenizer.

    A log-normal rounded and cut to 3..97 that matches the measured mean 11.6, median 11, p90 18, p99 28.
    """
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    return (math.log(10.7) + 0.41 * normal).exp().round().clamp(3, 97).long()


def make_batch(config: XLMRConfig, adapters: int, utterances: int, generator: torch.Generator) -> Batch:
    """Random tokens of MASSIVE's lengths, sorted by adapter; about two thirds of the inner tokens carry a label."""
    lengths = massive_lengths(adapters * utterances, generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    total = int(cu_seqlens[-1])
    input_ids = torch.randint(4, config.vocab_size, (total,), generator=generator)
    labels = torch.randint(0, config.num_labels, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 1 / 3] = -100
    first, last = cu_seqlens[:-1], cu_seqlens[1:] - 1
    input_ids[first], input_ids[last] = 0, 2
    labels[first], labels[last] = -100, -100
    labels[first + 1] = 0
    adapter = torch.arange(adapters, dtype=torch.int32).repeat_interleave(utterances)
    return Batch(input_ids, labels, cu_seqlens.int(), adapter)


def pad(batch: Batch, g: int, pad_id: int) -> Padded:
    """Adapter g's sequences side by side, padded to the longest of them."""
    places = [slice(*batch.cu_seqlens[s : s + 2].tolist()) for s in (batch.adapter == g).nonzero()[:, 0].tolist()]

    def stack(tensor: Tensor, value: int) -> Tensor:
        parts = [tensor[place] for place in places]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    return Padded(stack(batch.input_ids, pad_id), stack(batch.labels, -100), stack(torch.ones_like(batch.labels), 0))


class Kloss:
    """Our side: one packed pass for all adapters."""

    def __init__(self, model: XLMRForTokenClassification, bank: AdapterBank, dropout: float):
        self.model, self.bank, self.p, self.steps = model, bank, dropout, 0
        groups = bank.adapters
        self.moments = torch.zeros_like(bank.param), torch.zeros_like(bank.param)
        self.step_count = torch.zeros(groups, dtype=torch.long)
        self.rate, self.decay, self.clip = (torch.full((groups,), v) for v in (RATE, DECAY, CLIP))
        self.active = torch.ones(groups, dtype=torch.bool)

    def gradients(self, batch: Batch) -> Tensor:
        """Fills the bank's gradients; returns the losses fp32 [G]."""
        segments = make_segments(batch.cu_seqlens, batch.adapter, self.bank.adapters)
        dropout = self._dropout(batch, segments) if self.p else None
        logits = self.model(batch.input_ids, batch.cu_seqlens, segments, self.bank, dropout=dropout)
        loss, _ = token_loss(logits, batch.labels, segments)
        loss.sum().backward()
        return loss.detach()

    def _dropout(self, batch: Batch, segments) -> StepDropout:
        groups, sequences = self.bank.adapters, batch.adapter.numel()
        steps = torch.full((sequences,), self.steps)
        keys = row_keys(steps, torch.arange(sequences) % (sequences // groups), batch.cu_seqlens)
        p = torch.full((groups,), self.p)
        return StepDropout(p, p, p, torch.arange(groups), keys, segments.row_adapter)

    def step(self, batch: Batch) -> None:
        """One training step of every adapter."""
        bank = self.bank
        bank.zero_grad()
        self.gradients(batch)
        adapter_adamw_(
            bank.param, bank.grad, *self.moments, self.step_count, self.rate,
            betas=BETAS, eps=EPS, weight_decay=self.decay, max_norm=self.clip, active=self.active,
        )  # fmt: skip
        bank.refresh()
        self.steps += 1


class Peft:
    """The baseline: peft's set_adapter, one padded batch and one AdamW per adapter."""

    def __init__(self, ours: Kloss, dropout: float, autocast: bool, dtype: torch.dtype, count: int):
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        lora = LoraConfig(
            task_type="TOKEN_CLS", r=ours.bank.rank, lora_alpha=ours.bank.rank, lora_dropout=dropout,
            target_modules=r".*\.layer\.\d+\..*(query|key|value|dense)", modules_to_save=["classifier"],
        )  # fmt: skip
        base = _transformers_model(ours.model, dropout).to(dtype)
        self.names = [f"a{g}" for g in range(count)]
        self.model = get_peft_model(base, lora, adapter_name=self.names[0], autocast_adapter_dtype=autocast)
        for name in self.names[1:]:
            self.model.add_adapter(name, lora, autocast_adapter_dtype=autocast)
        self.optimizers = []
        for g, name in enumerate(self.names):
            tensors = {key: tensor.clone() for key, tensor in ours.bank._peft_tensors(g).items()}
            unexpected = set_peft_model_state_dict(self.model, tensors, adapter_name=name).unexpected_keys
            assert not unexpected, unexpected
            self.model.set_adapter(name)
            self.optimizers.append(
                torch.optim.AdamW(self.trainable(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
            )
        self.model.train()

    def trainable(self) -> list[Tensor]:
        """Parameters of the adapter in use."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def gradients(self, g: int, padded: Padded) -> Tensor:
        """Gradients of adapter g; returns its loss."""
        self.model.set_adapter(self.names[g])
        loss = self.model(**padded._asdict()).loss
        loss.backward()
        return loss.detach()

    def step(self, g: int, padded: Padded) -> None:
        """One training step of adapter g."""
        self.gradients(g, padded)
        optimizer = self.optimizers[g]
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _transformers_model(model: XLMRForTokenClassification, dropout: float):
    from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

    config = XLMRobertaConfig(
        **vars(model.config),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
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


def gate(ours: Kloss, theirs: Peft, exact: Peft, batch: Batch, padded: list[Padded]) -> dict[str, float]:
    """Losses and gradient norms without dropout: our error against peft in fp32 at most twice peft's in our dtype.

    Adapters 0, 1, ... are compared, one for each of `padded`; rounding is added to the bound. Returns our largest
    relative errors. Raises AssertionError.
    """
    ours.bank.zero_grad()
    loss = ours.gradients(batch)
    mine = torch.stack([loss, ours.bank.grad.float().norm(dim=1)])[:, : len(padded)].double()
    ours.bank.zero_grad()

    def figures(side: Peft) -> Tensor:
        columns = []
        for g, inputs in enumerate(padded):
            loss = side.gradients(g, inputs)
            norm = torch.nn.utils.get_total_norm([parameter.grad.float() for parameter in side.trainable()])
            columns.append(torch.stack([loss.float(), norm]))
            side.model.zero_grad(set_to_none=True)
        return torch.stack(columns, 1).double()

    truth = figures(exact)
    error, allowed = ((side - truth).abs().amax(1) / truth.amax(1) for side in (mine, figures(theirs)))
    floor = torch.finfo(ours.bank.work.dtype).eps + 32 * torch.finfo(torch.float32).eps
    assert (error <= 2 * allowed + floor).all(), f"ours is off by {error.tolist()}, peft by {allowed.tolist()}"
    return {"loss": float(error[0]), "gradient_norm": float(error[1])}


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80, in the unit of the values."""
    at = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), at.tolist(), strict=True))


def environment() -> dict:
    """Commit (None outside a clone), whether the tree differs from it, versions and device."""
    import peft
    import transformers

    def git(*words: str) -> str | None:
        done = subprocess.run(("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "*.py")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "peft": peft.__version__},
        "device": f"{cpu[0] if cpu else platform.machine()}, {torch.get_num_threads()} threads",
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict:
    """Builds both sides, checks them against each other, times them in turns. Returns the row."""
    config = XLMRConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, intermediate_size=4 * options.hidden, num_labels=options.labels,
    )  # fmt: skip
    row = environment()  # of the code as it is now, whatever is edited while the clock runs
    dtype, base_dtype = DTYPES[options.dtype], DTYPES[options.peft_dtype or options.dtype]
    generator = torch.Generator().manual_seed(options.seed)
    batch = make_batch(config, options.adapters, options.utterances, generator)
    padded = [pad(batch, g, config.pad_token_id) for g in range(options.adapters)]
    count = min(options.peft_adapters or options.adapters, options.adapters)

    def build(dtype: torch.dtype, p: float) -> Kloss:
        model = XLMRForTokenClassification.random(config, options.seed).freeze_backbone().to(dtype)
        bank = AdapterBank(model, options.adapters, options.rank, dtype=dtype)
        noise = torch.Generator().manual_seed(options.seed)
        for layer in range(config.num_hidden_layers):
            for target in bank.targets:
                bank.view(bank.param, f"{layer}.{target}.b").normal_(0, 0.02, generator=noise)
        bank.refresh()
        return Kloss(model, bank, p)

    checked = min(options.checked, count)
    ours = build(dtype, 0.0)
    same, exact = (Peft(ours, 0.0, autocast=False, dtype=kind, count=checked) for kind in (dtype, torch.float32))
    errors = gate(ours, same, exact, batch, padded[:checked])
    del same, exact
    ours = build(dtype, options.dropout)
    casts = {"on": [True], "off": [False], "both": [True, False]}[options.autocast]
    if base_dtype == torch.float32:
        casts = [True]  # the adapters are fp32 either way
    sides = {
        f"{options.peft_dtype or options.dtype}, autocast_adapter_dtype={cast}":
            Peft(ours, options.dropout, cast, base_dtype, count) for cast in casts
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ("ours", *sides)}

    def clock(name: str, first: Callable[[], None], work: Callable[[], None], factor: float = 1.0) -> None:
        first()  # not counted: the other side's turn has left the caches and the heap to itself
        start = time.perf_counter()
        work()
        times[name].append((time.perf_counter() - start) * factor)

    def all_adapters(side: Peft) -> None:
        for g in range(count):
            side.step(g, padded[g])

    ours.step(batch)
    for side in sides.values():
        side.step(0, padded[0])
    for turn in range(options.rounds):
        clock("ours", lambda: ours.step(batch), lambda: ours.step(batch))
        for name, side in sides.items():
            first = partial(side.step, 0, padded[0])
            clock(name, first, partial(all_adapters, side), options.adapters / count)
        latest = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items())
        print(f"round {turn + 1}: {latest}", flush=True)
    best = min(sides, key=lambda name: statistics.median(times[name]))
    ratios = [theirs / mine for theirs, mine in zip(times[best], times["ours"], strict=True)]
    tokens = int(batch.cu_seqlens[-1])
    return row | {
        "case": "whole_step", "dtype": options.dtype, "dropout": options.dropout, "rounds": options.rounds,
        "shape": {
            "layers": options.layers, "hidden": options.hidden, "heads": options.heads, "adapters": options.adapters,
            "rank": options.rank, "utterances": options.utterances, "tokens": tokens,
            "padded_tokens": sum(part.input_ids.numel() for part in padded), "vocabulary": options.vocabulary,
        },
        "seconds": quantiles(times["ours"]), "tokens_per_second": tokens / statistics.median(times["ours"]),
        "baseline": f"peft set_adapter, one adapter at a time ({best})", "baseline_adapters_timed": count,
        "baseline_seconds": {name: quantiles(times[name]) for name in sides},
        "ratio": quantiles(ratios), "gate_relative_error": errors,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> dict:
    """Command line: measures, prints a short table, appends the row to bench/results."""
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
    parser.add_argument("--peft-dtype", choices=sorted(DTYPES), default=None, help="peft's dtype, where it differs")
    parser.add_argument("--dropout", type=float, default=0.1, help="of LoRA inputs, hidden states, attention")
    parser.add_argument("--autocast", choices=("on", "off", "both"), default="both", help="autocast_adapter_dtype")
    parser.add_argument("--out", type=Path, default=RESULTS / "whole_step.jsonl", help="file that gets the row")
    options = parser.parse_args(arguments)
    row = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + os.linesep)
    print(f"{row['device']}, {row['dtype']}, dropout {row['dropout']}: {row['shape']}")
    for name, seconds in {"kloss": row["seconds"], **row["baseline_seconds"]}.items():
        print(f"  {name:45s} " + "  ".join(f"{key} {value:8.2f} s" for key, value in seconds.items()))
    print("  ratio " + "  ".join(f"{key} {value:.2f}" for key, value in row["ratio"].items()))
    return row


if __name__ == "__main__":
    main()
