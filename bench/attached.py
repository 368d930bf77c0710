"""Training adapters on a model of transformers: `kloss.attach` with `AdapterAdamW`, against peft one adapter at a time.

    python -m bench.attached [--adapters 1 52] [--rows 4] [--tokens 16] [--layers 4] [--width 768] [--rank 32] [--rounds 5]

A step is forward, each adapter's mean loss, backward, clipping and AdamW, for a batch of `rows` sentences of every adapter. Both
sides start from the same adapters, and before any timing their losses are checked. peft switches by `set_adapter`; "without it"
the adapter's name is put in its place, and the time is the floor of what peft could reach. Rounds alternate in one process; a
ratio is peft's time over ours in the same round, the median over rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import kloss

from .timing import ROOT, environment

LABELS, VOCABULARY, LR, MAX_NORM = 60, 1000, 1e-3, 1.0
TARGETS = ("query", "key", "value", "dense")


def base_model(width: int, layers: int, seed: int = 0) -> nn.Module:
    """An XLM-R of transformers with random weights, without dropout."""
    from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return XLMRobertaForTokenClassification(config).train()


class Ours:
    """All adapters in one batch."""

    def __init__(self, model: nn.Module, adapters: int, rank: int):
        self.model = kloss.attach(model, adapters=adapters, rank=rank, targets=TARGETS)
        self.optimizer = kloss.optim.AdapterAdamW(model, lr=LR, max_norm=MAX_NORM)
        self.adapters = adapters

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Train on [adapters, rows, tokens]. Returns the losses [adapters]."""
        ids = torch.arange(self.adapters).repeat_interleave(tokens.shape[1])
        with kloss.use_adapters(self.model, ids):
            logits = self.model(tokens.flatten(0, 1)).logits
        losses = kloss.adapter_losses(logits, labels.flatten(0, 1), ids)
        losses.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.detach()


class Peft:
    """One adapter after another, each with an AdamW of its own. ours: whose adapters they start from."""

    def __init__(self, model: nn.Module, ours: Ours, rank: int, switched: bool):
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from peft.tuners.lora import LoraLayer

        from kloss.models.attach import _tensors

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
        names = [f"adapter{g}" for g in range(ours.adapters)]
        self.model = get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            self.model.add_adapter(name, config)
        for g, name in enumerate(names):
            set_peft_model_state_dict(
                self.model, {key: t.clone() for key, t in _tensors(ours.model, g).items()}, adapter_name=name
            )
        self.names, self.switched = names, switched
        self.layers = [layer for layer in self.model.modules() if isinstance(layer, LoraLayer)]
        self.weights = [[p for key, p in self.model.named_parameters() if f".{name}." in key] for name in names]
        for weight in [] if switched else [weight for own in self.weights for weight in own]:
            weight.requires_grad_(True)
        self.optimizers = [torch.optim.AdamW(own, lr=LR, weight_decay=0.01, fused=True) for own in self.weights]
        self.model.train()

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """As `Ours.step`."""
        losses = []
        for g, name in enumerate(self.names):
            if self.switched:
                self.model.set_adapter(name)
            else:
                for layer in self.layers:
                    layer._active_adapter = [name]
            loss = self.model(input_ids=tokens[g], labels=labels[g]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.weights[g], MAX_NORM)
            self.optimizers[g].step()
            self.optimizers[g].zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)


def compare(adapters: int, options: argparse.Namespace) -> dict:
    """Check, then time both sides. Returns the row. Raises AssertionError for losses that differ."""
    ours = Ours(base_model(options.width, options.layers), adapters, options.rank)
    sides: dict[str, Ours | Peft] = {"kloss": ours}
    for name, switched in (("peft", True), ("peft without set_adapter", False)):
        sides[name] = Peft(base_model(options.width, options.layers), ours, options.rank, switched)
    generator = torch.Generator().manual_seed(1)
    shape = adapters, options.rows, options.tokens
    tokens = torch.randint(4, VOCABULARY, shape, generator=generator)
    labels = torch.randint(LABELS, shape, generator=generator)
    for _ in range(2):  # the second losses are those after an update
        losses = {name: side.step(tokens, labels) for name, side in sides.items()}
        for name in losses:
            torch.testing.assert_close(losses[name], losses["kloss"], rtol=1e-4, atol=0, msg=f"{name}'s losses differ from ours")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            times[name].append(seconds(lambda side=side: side.step(tokens, labels)))
    ratios = {name: statistics.median(a / b for a, b in zip(own, times["kloss"], strict=True)) for name, own in times.items()}
    return {
        "case": "attached", "adapters": adapters, "rows": options.rows, "tokens": options.tokens, "layers": options.layers,
        "width": options.width, "rank": options.rank, "rounds": options.rounds,
        "seconds": {name: statistics.median(own) for name, own in times.items()}, "ratio": ratios,
    }  # fmt: skip


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, append a row for each number of adapters, print them."""
    parser = argparse.ArgumentParser(prog="python -m bench.attached", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 52])
    parser.add_argument("--rows", type=int, default=4, help="sentences of each adapter")
    for name, default in (("tokens", 16), ("layers", 4), ("width", 768), ("rank", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/attached.jsonl", help="file that gets the rows")
    options = parser.parse_args(arguments)
    about = environment("cpu")
    rows = [about | compare(adapters, options) for adapters in options.adapters]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        times = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in row["seconds"].items())
        ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in row["ratio"].items() if name != "kloss")
        print(f"{row['adapters']} adapters x {row['rows']} sentences of {row['tokens']} tokens: {times}; as fast as {ratios}")
    return rows


if __name__ == "__main__":
    main()
