"""Kept states: a learner's row as it was after some of its experiences, a file each in the run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..files import opened, read_tensors, write_tensors
from .probes import State
from .rundir import digest_of


class KeptRow(NamedTuple):
    param: Tensor  # fp32 [P], laid out as in a bank of that rank
    rank: int


class States:
    """The states of a run.

    folder: of its own within the run folder.
    say: gets a line, once, if a state has no digest.
    """

    def __init__(self, folder: Path, say: Callable[[str], object] = lambda text: None):
        self.folder, self.say, self.said = folder, say, False

    def _file(self, state: State) -> Path:
        return self.folder / f"{state.learner}-{state.experience}.safetensors"

    def keep(self, state: State, row: KeptRow) -> None:
        """Write a state; one that is there is replaced."""
        self.folder.mkdir(exist_ok=True)
        tensors = {"param": row.param.cpu().contiguous(), "rank": torch.tensor(row.rank)}
        write_tensors(self._file(state), tensors, {"digest": digest_of(tensors, "")})

    def load(self, state: State) -> KeptRow:
        """Read a state. Raises UserError, which says what to do, for one that is missing or damaged."""
        from safetensors import safe_open

        file, advice = self._file(state), f"delete the folder {self.folder.parent} to begin again"
        if not file.exists():
            raise UserError(f"{file} is gone; the run needs it, {advice}")
        with opened(file):  # what may not be read is no damage
            pass
        try:
            tensors = read_tensors(file)
        except UserError as error:
            raise UserError(f"{error}; {advice}") from error
        if tensors.keys() != {"param", "rank"} or tensors["param"].dim() != 1 or tensors["rank"].numel() != 1:
            raise UserError(f"{file} is not what kloss wrote; {advice}")
        with safe_open(file, "np") as stored:
            digest = (stored.metadata() or {}).get("digest")
        if digest not in (None, digest_of(tensors, "")):
            raise UserError(f"{file} is damaged (its contents have not the digest written with them); {advice}")
        if digest is None and not self.said:
            self.say(f"states in {self.folder} have no digest (earlier versions wrote none); they are used as they are")
            self.said = True
        return KeptRow(tensors["param"], int(tensors["rank"]))
