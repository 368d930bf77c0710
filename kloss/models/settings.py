"""The settings of the adapters that are attached to a model: names, ranks, scalings, seeds; what of them a state dict holds."""

import json
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import parse_json
from ..kernels.dropout import stream_keys
from .peft_files import LARGEST_ALPHA

LARGEST_SEED = 1 << 63
RANK = "a whole number of at least 1", lambda rank: isinstance(rank, Integral) and int(rank) >= 1
ALPHA = "a finite number", lambda alpha: abs(alpha) <= LARGEST_ALPHA
DROPOUT = "in [0, 1)", lambda chance: 0 <= chance < 1
EACH = ("names", "ranks", "alphas", "scaling", "chances", "seeds", "dropout_seeds")  # lists with an entry for each adapter
SAVED = (*EACH, "seed", "dropout_seed", "made", "step")


class Settings:
    """What G adapters are besides their weights.

    names: different from each other.
    ranks, alphas, scaling: LoRA's; `rank` is the largest that fits, R.
    chances: of dropout; step: the dropout's.
    seeds: of A; dropout_seeds: of dropout.
    births: (the adapter's own number, how often it began anew), by which an optimiser knows it.
    sources: by a fork's own number, the birth of what it is a copy of.
    ends: of the layers' names, as `attach` got them; None: all-linear.
    """

    def __init__(self, names: Sequence[str], rank: Any, alpha: Any, dropout: Any, seeds: tuple[int, int], ends: list[str] | None):
        self.names, adapters = [*names], len(names)
        self.ranks = one_each("rank", rank, adapters, *RANK)
        self.alphas = [*self.ranks] if alpha is None else one_each("alpha", alpha, adapters, *ALPHA)
        self.chances = one_each("dropout", dropout, adapters, *DROPOUT)
        self.scaling = [alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True)]
        self.rank, self.ends, self.step, self.made = max(self.ranks), ends, 0, 0
        self.seed, self.dropout_seed = seeds
        self.seeds, self.dropout_seeds = map(list, zip(*(self.next_seeds() for _ in names), strict=True))
        self.births, self.sources = [(g, 0) for g in range(adapters)], dict[int, tuple[int, int]]()
        self._last_number = adapters - 1

    def next_seeds(self) -> list[int]:
        """The seeds of the adapter that is made next, of A and of dropout; no other gets them, whoever is gone."""
        self.made += 1
        return stream_keys(torch.tensor([self.seed, self.dropout_seed]), torch.tensor([self.made - 1] * 2), 0).tolist()

    def born(self, g: int, name: str, source: tuple[int, int] | None = None) -> None:
        """Row g is a new adapter, or a copy of the one of birth `source`, with seeds of its own."""
        self._last_number += 1
        self.names[g], self.births[g] = name, (self._last_number, 0)
        self.seeds[g], self.dropout_seeds[g] = self.next_seeds()
        if source is not None:
            self.sources[self._last_number] = source

    def begin_anew(self, g: int) -> None:
        """Adapter g has no past."""
        self.births[g] = self.births[g][0], self.births[g][1] + 1

    def index(self, adapter: int | str) -> int:
        """The row of an adapter, given as the row or by name. Raises UserError where there is none."""
        if isinstance(adapter, str):
            if adapter not in self.names:
                raise UserError(f"there is no adapter {adapter}; there are {', '.join(self.names)}")
            return self.names.index(adapter)
        if isinstance(adapter, bool) or not isinstance(adapter, Integral) or not 0 <= adapter < len(self.names):
            raise UserError(f"there is no adapter {adapter}, the model has 0 to {len(self.names) - 1}")
        return int(adapter)

    def take(self, rows: Sequence[int]) -> None:
        """Adapter j becomes what rows[j] was."""
        for name in (*EACH, "births"):
            values = getattr(self, name)
            setattr(self, name, [values[g] for g in rows])

    def packed(self) -> Tensor:
        """What a state dict holds: JSON as uint8, which safetensors can hold too."""
        text = json.dumps({name: getattr(self, name) for name in SAVED})
        return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)

    def unpack(self, state: Tensor, owner: str) -> None:
        """The inverse. Raises UserError, with nothing changed, for other things, other numbers of adapters or a rank above R.

        owner: of the state, for messages.
        """
        complaint = f"{owner}: the state of these adapters holds no settings that fit"
        given = parse_json(state.cpu().numpy().tobytes(), complaint)
        if not isinstance(given, dict) or given.keys() != {*SAVED}:
            raise UserError(f"{complaint}: needed are {', '.join(SAVED)}")
        adapters, whole = len(self.names), ("a whole number", lambda number: isinstance(number, Integral))
        if len(check_names(given["names"])) != adapters:
            raise UserError(f"{complaint}: names of {adapters} adapters are needed, got {given['names']!r:.200}")
        rules = {"ranks": RANK, "alphas": ALPHA, "scaling": ALPHA, "chances": DROPOUT, "seeds": whole, "dropout_seeds": whole}
        for name, rule in rules.items():
            given[name] = one_each(f"{complaint}: {name}", given[name], adapters, *rule)
        numbers = ("seed", "dropout_seed", "made", "step")
        one_each(f"{complaint}: {', '.join(numbers)}", [given[name] for name in numbers], len(numbers), *whole)
        if max(given["ranks"]) > self.rank:
            raise UserError(f"{complaint}: the largest rank is {self.rank}, got {max(given['ranks'])}")
        vars(self).update(given)


def check_names(names: Any) -> list[str]:
    """The names of adapters. Raises UserError unless they are different and not empty."""
    listed = [*names] if isinstance(names, list | tuple) else []
    if not listed or not all(isinstance(name, str) and name for name in listed) or len({*listed}) < len(listed):
        raise UserError(f"adapters must be a whole number of at least 1 or a list of different names, got {names!r:.200}")
    return listed


def one_each(name: str, given: Any, adapters: int, allowed: str, is_allowed: Callable[[Any], bool]) -> list:
    """One value per adapter, an int or a float, from one for all or from a sequence.

    Raises UserError for another number or what is not allowed.
    """
    values = [given] * adapters if isinstance(given, Real) else [*given] if isinstance(given, Iterable) else []
    if len(values) != adapters or not all(isinstance(v, Real) and not isinstance(v, bool) and is_allowed(v) for v in values):
        raise UserError(f"{name} must be {allowed}, one for all or one for each of the {adapters} adapters; got {given!r}")
    return [int(v) if isinstance(v, Integral) else float(v) for v in values]  # not numpy's, which JSON and torch.load refuse


def whole_numbers(given: Any) -> Tensor | None:
    """int64 [B] from a sequence or a tensor of whole numbers; None for anything else."""
    try:
        numbers = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    if numbers.dim() != 1 or numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.is_complex():
        return None
    whole = numbers.long()
    return None if not numbers.dtype.is_signed and bool((whole < 0).any()) else whole
