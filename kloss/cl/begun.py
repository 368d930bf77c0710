"""What a run folder says that it began on, against what the run goes on with: groups, the backbone's weights, threads."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import Config
from ..errors import UserError
from ..files import read_json
from .corpus import Corpus
from .rundir import RunFolder, digest_of
from .study import make_groups


def begun(file: Path) -> dict:
    """Return what a run folder's JSON file holds; nothing without it, or if it is damaged, of which its own reader speaks."""
    with contextlib.suppress(UserError):
        return read_json(file)
    return {}


def groups_of(config: Config, corpus: Corpus, folder: Path, say: Callable[[str], object]) -> dict[str, str]:
    """Return what a run's identity says of the groups that a file of `--groups` makes: its contents may change.

    folder: the run folder, which may not be there yet.
    say: gets a line of one that an earlier version began.
    """
    if "partial" not in config.strategies or config.groups in ("script", "family"):
        return {}
    groups = {f"group of {locale}": group for locale, group in make_groups(config, corpus.locales).items()}
    before = begun(folder / "config.json")
    if not before or before.keys() & groups.keys():
        return groups
    say(f"{folder} does not say what groups it has (earlier versions wrote none); it goes on with {config.groups}")
    return {}


def digest_of_weights(model: torch.nn.Module) -> str:
    """Hex digits that depend on a model's weights; a second for 500 MB, which took longer to read."""
    return digest_of({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, "")


def check_backbone(config: Config, folder: RunFolder, digest: str) -> None:
    """Raise UserError if a pretrained backbone has not the weights that the run began on, whose digest is in env.json.

    The tiny one has other weights only as another number of threads, or another machine, rounds: `changes` says so.
    """
    before = begun(folder.path / "env.json").get("backbone")
    if config.backbone != "tiny" and before not in (None, digest):
        raise UserError(
            f"{folder.path} holds a run on other weights of backbone {config.backbone} (their digest was {before}, is {digest}); "
            "put those back, or choose another --out"
        )


def changes(config: Config, folder: RunFolder, digest: str, warm_up: int | None) -> list[str]:
    """A line for each change since a run stopped that changes its scores.

    digest: of the backbone's weights.
    warm_up: the threads of its warm-up.
    """
    before, threads, lines = begun(folder.path / "env.json"), torch.get_num_threads(), []
    differ = "scores may differ from those of a run that was not stopped"
    for name, now in (("threads", threads), *([] if config.exact else [("processes", folder.processes)])):
        if before.get(name, now) != now:
            lines.append(f"the run stopped on {before[name]} {name} and goes on with {now}: {differ}")
    known, number = before.get("backbone"), before.get("backbone_threads", warm_up)
    if known not in (None, digest) or known is None and number != warm_up:
        why = "" if number == warm_up else f" (threads of its warm-up: {number}, now {warm_up})"
        lines.append(f"the run stopped on a tiny backbone of other weights{why}: {differ}")
    elif known is None and (before or folder.checkpoints()):
        lines.append(
            f"{folder.path} has no digest of its backbone (earlier versions wrote none); the run goes on with what is there"
        )
    if not config.exact and warm_up not in (None, threads):
        lines.append(
            f"the tiny backbone in the cache was warmed up on {warm_up} thread{'s' * (warm_up != 1)}, this run has {threads}: "
            "warmed up on as many it would have other weights, and the run other scores"
        )
    return lines
