"""Kept states: a learner's row as it was after some of its experiences, a file each in the run folder."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_tensors, write_tensors
from .probes import State


class KeptRow(NamedTuple):
    param: Tensor  # fp32 [P], laid out as in a bank of that rank
    rank: int


class States:
    """The states of a run, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _file(self, state: State) -> Path:
        return self.folder / f"{state.learner}-{state.experience}.safetensors"

    def keep(self, state: State, row: KeptRow) -> None:
        """Write a state; one that is there is replaced."""
        self.folder.mkdir(exist_ok=True)
        write_tensors(self._file(state), {"param": row.param.cpu(), "rank": torch.tensor(row.rank)})

    def load(self, state: State) -> KeptRow:
        """Read a state. Raises UserError for one that is missing or damaged."""
        file = self._file(state)
        if not file.exists():
            raise UserError(f"{file} is gone; the run needs it, delete the folder {self.folder.parent} to begin again")
        tensors = read_tensors(file)
        if tensors.keys() != {"param", "rank"} or tensors["param"].dim() != 1 or tensors["rank"].numel() != 1:
            raise UserError(f"{file} is not what kloss wrote; delete the folder {self.folder.parent} to begin again")
        return KeptRow(tensors["param"], int(tensors["rank"]))
