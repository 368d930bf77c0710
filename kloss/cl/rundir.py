"""A run's folder: config.json, env.json, log.jsonl, checkpoint.safetensors, scores.csv, scores.json (written last: done).

With --slot-counts slots.csv too.

Of several processes each has its own checkpoint, checkpoint-1-of-3.safetensors, and log, log-1.jsonl.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..files import logs, opened, read_json, write_json, write_tensors, write_text
from ..kernels import multi_lora_cpu

LINE = 4096  # bytes that a line of a log does not reach


def checkpoint_name(process: int, processes: int) -> str:
    """The checkpoint's file of one of so many processes."""
    return "checkpoint.safetensors" if processes == 1 else f"checkpoint-{process}-of-{processes}.safetensors"


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    state: Any  # JSON
    verified: bool  # it has a digest, and that of its contents; earlier versions wrote none


class RunFolder:
    """The files of a run, in a folder that `open_run` has opened.

    Every method that writes raises UserError where the file system refuses, and where the folder is gone: removed while the
    run went on, it is not made anew, since nobody could continue it there.
    """

    def __init__(self, path: Path, lock: IO, process: int = 0, processes: int = 1):
        self.path, self.lock, self.started = path, lock, time.time()
        self.process, self.processes = process, processes

    @property
    def checkpoint(self) -> Path:
        """This process's checkpoint."""
        return self.path / checkpoint_name(self.process, self.processes)

    def checkpoints(self) -> list[tuple[int, int]]:
        """Of which process, of how many, there are checkpoints."""
        names = (re.fullmatch(r"checkpoint(?:-(\d+)-of-(\d+))?\.safetensors", file.name) for file in self.path.iterdir())
        return sorted((int(name[1] or 0), int(name[2] or 1)) for name in names if name)

    def remove_other_checkpoints(self) -> None:
        """Remove the checkpoints of jobs of another number of processes."""
        self.check()
        for process, processes in self.checkpoints():
            if processes != self.processes:
                (self.path / checkpoint_name(process, processes)).unlink(missing_ok=True)

    @property
    def done(self) -> bool:
        return (self.path / "scores.json").exists()

    def scores(self) -> dict:
        """Return the contents of scores.json."""
        return read_json(self.path / "scores.json")

    def check(self) -> None:
        """Raise UserError unless this is still the folder that was opened: its lock is ours, its configuration is there."""
        try:
            ours = os.path.samestat(os.stat(self.path / ".lock"), os.fstat(self.lock.fileno()))
            gone = not (ours and (self.path / "config.json").exists())
        except FileNotFoundError:
            gone = True
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        if gone:
            raise UserError(f"the run folder {self.path} is gone (removed, or begun again); nothing is written in its place")

    def save_scores(self, scores: dict) -> None:
        """Write scores.json, after which the run is done."""
        self.check()
        write_json(self.path / "scores.json", scores)

    def save_table(self, name: str, text: str) -> None:
        """Write scores.csv or slots.csv."""
        self.check()
        write_text(self.path / name, text)

    def log(self, **entry: object) -> None:
        """Append a line to log.jsonl, or to this process's own log."""
        self.check()
        line = json.dumps({"time": round(time.time() - self.started, 3), **entry})
        log = self._log(self.process)
        try:
            with open(log, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {log}: {error.strerror}") from error

    def last_entry(self, process: int) -> dict | None:
        """The last line of a process's log; None before it has one, or while it is being written."""
        try:
            with open(self._log(process), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LINE))
                return json.loads(file.read().split(b"\n")[-2])
        except (OSError, IndexError, ValueError):
            return None

    def _log(self, process: int) -> Path:
        return self.path / (f"log-{process}.jsonl" if process else "log.jsonl")

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping) -> None:
        """Replace this process's checkpoint, in one rename. state: as JSON."""
        self.check()
        on_host, text = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, json.dumps(state)
        write_tensors(self.checkpoint, on_host, {"state": text, "digest": digest_of(on_host, text)})

    def load_checkpoint(self, of: tuple[int, int] | None = None, *, whole: bool = True) -> Checkpoint | None:
        """Return the last checkpoint of a process of so many, by default of this one; None without it.

        whole: with its tensors, without which it is not verified. Then nobody may replace it meanwhile: it is opened twice.
        Raises UserError for a damaged one.
        """
        from safetensors import safe_open

        file = self.checkpoint if of is None else self.path / checkpoint_name(*of)
        try:
            if not file.exists():
                return None
            with opened(file):  # safe_open hangs at a FIFO, and says of a file without permission that it does not exist
                pass
            with self.reading_checkpoint(of), safe_open(file, "pt" if whole else "np") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()} if whole else {}  # noqa: SIM118
                text = metadata.get("state", "")
                if whole and "digest" in metadata and metadata["digest"] != digest_of(tensors, text):
                    raise UserError("its contents have not the digest written with them")
                return Checkpoint(tensors, json.loads(text), whole and "digest" in metadata)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error

    @contextmanager
    def reading_checkpoint(self, of: tuple[int, int] | None = None) -> Iterator[None]:
        """Turn what shows, in the block, that the checkpoint is damaged into a UserError that says what to do."""
        from safetensors import SafetensorError

        try:
            yield
        except (ValueError, SafetensorError, RecursionError) as error:  # UserErrors and JSON's are ValueErrors
            file = self.checkpoint if of is None else self.path / checkpoint_name(*of)
            raise UserError(f"{file} is damaged or cut short ({error}); delete it to train again from the start") from error

    def write_environment(self, device: torch.device, backbone: str | None = None, backbone_threads: int | None = None) -> None:
        """Write env.json: command, commit, versions, device, threads.

        backbone: the digest of its weights. backbone_threads: those of the tiny backbone's warm-up.
        """
        self.check()
        if device.type == "cuda":
            name, lora = torch.cuda.get_device_name(device), "Triton"
        else:
            name, lora = platform.processor() or platform.machine(), "csrc" if multi_lora_cpu.built() else "plain torch"
        packages = ("kloss", "torch", "triton", "transformers", "datasets", "numpy")
        write_json(
            self.path / "env.json",
            {
                "command": " ".join(["python -m kloss.run", *sys.argv[1:]]),
                **commit(),
                "python": platform.python_version(),
                **{package: _version(package) for package in packages},
                "device": f"{device.type} ({name})",
                "threads": torch.get_num_threads(),
                "processes": self.processes,
                "backbone": backbone,
                "backbone_threads": backbone_threads,
                "lora": lora,
            },
        )


@contextmanager
def open_run(folder: str | Path, config: Mapping, process: int = 0, processes: int = 1) -> Iterator[RunFolder]:
    """Open or create a run folder and lock it until the block ends; remove what killed processes left half-written.

    config: the settings that decide the figures; values must be JSON.
    process: of so many of a job; 0 opens the folder before the others.
    Raises UserError if the folder holds another configuration, is not a run folder, or is open in another process.
    """
    path, config = Path(folder), json.loads(json.dumps(config))
    file = path / "config.json"
    try:
        foreign = path.exists() and not file.exists() and not (path.is_dir() and all(map(_before_config, path.iterdir())))
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}; choose another --out") from error
    if foreign:
        raise UserError(f"{path} exists and is not a run folder; choose another --out")
    with _locked(path, process) as (lock, locked):
        if file.exists():
            try:
                before = read_json(file)
            except UserError as error:
                raise UserError(f"{error}; rename {path} to train from the start, or choose another --out") from error
            changed = [key for key in sorted(config.keys() | before.keys()) if config.get(key) != before.get(key)]
            changed.sort(key="corpus".__eq__)  # name a setting rather than the fingerprint that follows from it
            if changed:
                key = changed[0]
                was, now = (repr(of[key]) if key in of else "its default" for of in (before, config))
                change = f"{key} was {was}, is {now}"
                raise UserError(f"{path} holds a run of another configuration ({change}); choose another --out")
        else:
            write_json(file, config)
        if locked and process == 0:
            _remove_leftovers(path)
        if locked and processes > 1:
            _flock(path, lock, fcntl.LOCK_SH)
        run = RunFolder(path, lock, process, processes)
        yield run
        run.check()


def _before_config(file: Path) -> bool:
    """Return whether a run killed before it wrote its configuration may have left this file."""
    return file.name == ".lock" or file.name.startswith(".config.json.")


@contextmanager
def _locked(path: Path, process: int) -> Iterator[tuple[IO, bool]]:
    """Lock a folder, made if absent, against other jobs; the system unlocks it when all processes of this one are dead.

    Gives the lock's file, and False on a file system without locks. Raises UserError if another job has the lock.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {path / '.lock'}: {error.strerror}") from error
    with lock:
        yield lock, _flock(path, lock, fcntl.LOCK_SH if process else fcntl.LOCK_EX)


def _flock(path: Path, lock: IO, kind: int) -> bool:
    """Lock, or change the lock; the processes of a job share theirs once the first has had it alone. False without locks."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is open in another process; wait for its end or choose another --out") from None
    except OSError:
        return False
    return True


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left: temporary files and an unfinished last line of a log.

    `written` makes .*.partial, safetensors makes .tmp and six characters.
    """
    try:
        for file in (*path.rglob(".*.partial"), *path.rglob(".tmp??????")):
            if not _in_use(file.name):
                file.unlink(missing_ok=True)
        for log in logs(path):
            os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}") from error


def _in_use(name: str) -> bool:
    """Return whether another process may be writing this temporary file: a report, for which `write_report` takes no lock."""
    if not name.startswith(".report.html."):
        return False
    try:
        os.kill(int(name.split(".")[3]), 0)  # the process that `written` puts into the name
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError, OverflowError):  # another user's process; no number of a process
        pass
    return True


def digest_of(tensors: Mapping[str, Tensor], state: str) -> str:
    """Return 32 hex digits that depend on a checkpoint's tensors, on the host, and on its state."""
    digest = hashlib.blake2b(state.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, list(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> dict[str, str | bool | None]:
    """Return kloss's git commit, and whether source files differ from it; None without git or from a wheel."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", ":/*.py", ":/csrc"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
