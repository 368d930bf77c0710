"""The processes of a job as torchrun starts them. Each trains learners of its own; the run folder is what they share."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import UserError

POLL = 0.1  # seconds; the host sleeps between looks at whether all have come, and so hears signals
LONGEST = timedelta(days=365)  # that one waits; a process that dies is noticed at once


class ProcessLost(Exception):
    """Another process of the job has ended before its time."""


class Processes:
    """This process and the others, all of which make the same calls in the same order.

    rank: of this one, from 0. number: how many there are; 1 without torchrun.
    """

    def __init__(self, rank: int = 0, number: int = 1):
        self.rank, self.number = rank, number

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when all have come here. meanwhile: called again and again. Raises ProcessLost if one cannot come any more."""
        if self.number == 1:
            return
        try:
            work = dist.barrier(async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(POLL)
            work.wait()
        except RuntimeError as error:
            raise ProcessLost(str(error)) from error

    @contextmanager
    def first(self) -> Iterator[None]:
        """The block runs in process 0, then in the others, which find in files what that one made."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def check_same(self, what: Mapping[str, object]) -> None:
        """Raises UserError, in the processes that differ from process 0, where values of `what` differ; ProcessLost in others."""
        if self.number == 1:
            return
        theirs: list[Mapping[str, object]] = [{}] * self.number
        try:
            dist.all_gather_object(theirs, what)
        except RuntimeError as error:
            raise ProcessLost(str(error)) from error
        for name, value in what.items():
            if value != theirs[0][name]:
                raise UserError(f"{name} is {value} in process {self.rank} and {theirs[0][name]} in process 0")
        if any(other != theirs[0] for other in theirs):
            raise ProcessLost("another process differs")


ALONE = Processes()


@contextmanager
def started() -> Iterator[Processes]:
    """The processes that torchrun has started, connected while the block runs; one without torchrun."""
    number = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if number == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=LONGEST)  # no tensor goes from one to another
    try:
        yield Processes(dist.get_rank(), number)
    finally:
        dist.destroy_process_group()


def own_gpu() -> int:
    """The index of the GPU that is this process's own. Raises UserError where torchrun started more than there are."""
    if not dist.is_torchelastic_launched():
        return torch.cuda.current_device()
    index = int(os.environ["LOCAL_RANK"])
    if index >= torch.cuda.device_count():
        raise UserError(f"process {index} of this machine has no GPU of its own: there are {torch.cuda.device_count()}")
    return index
