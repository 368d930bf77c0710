"""A run's folder: config.json, env.json, log.jsonl, checkpoint.safetensors, scores.json (written last: it means done)."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_json, write_json, write_tensors
from ..kernels import multi_lora_cpu


class RunFolder:
    """The files of a run. path: a folder that `open_run` has opened."""

    def __init__(self, path: Path):
        self.path, self.started = path, time.time()

    @property
    def done(self) -> bool:
        return (self.path / "scores.json").exists()

    def scores(self) -> dict:
        """The contents of scores.json."""
        return read_json(self.path / "scores.json")

    def log(self, **entry: object) -> None:
        """Appends a line to log.jsonl."""
        line = json.dumps({"time": round(time.time() - self.started, 3), **entry})
        try:
            with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path / 'log.jsonl'}: {error.strerror}") from error

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping) -> None:
        """Replaces the checkpoint, in one rename."""
        write_tensors(self.path / "checkpoint.safetensors", dict(tensors), {"state": json.dumps(state)})

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and state of the last checkpoint; None where there is none. Raises UserError for a damaged one."""
        from safetensors import SafetensorError, safe_open

        file = self.path / "checkpoint.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                state = json.loads(opened.metadata()["state"])
                return {name: opened.get_tensor(name) for name in opened.keys()}, state  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{file} is damaged or cut short ({error}); delete it to train again from the start") from error

    def write_environment(self, device: torch.device) -> None:
        """Writes env.json: command, commit, versions, device."""
        name, lora = platform.processor() or platform.machine(), "csrc" if multi_lora_cpu.built() else "plain torch"
        if device.type == "cuda":
            name, lora = torch.cuda.get_device_name(device), "Triton"
        write_json(
            self.path / "env.json",
            {
                "command": " ".join(["python -m kloss.run", *sys.argv[1:]]),
                **_commit(),
                "python": platform.python_version(),
                **{name: _version(name) for name in ("kloss", "torch", "triton", "transformers", "datasets", "numpy")},
                "device": f"{device.type} ({name})",
                "threads": torch.get_num_threads(),
                "lora": lora,
            },
        )


@contextmanager
def open_run(folder: str | Path, config: Mapping) -> Iterator[RunFolder]:
    """Opens or creates a run folder for a configuration, for this process alone until the block ends.

    folder: where. config: what decides the results, as JSON. What a killed process left half-written there is removed. Raises
    UserError where the folder holds another configuration, is not a run folder, or is open in another process.
    """
    path, config = Path(folder), json.loads(json.dumps(config))
    file = path / "config.json"
    if path.exists() and not file.exists() and not (path.is_dir() and all(map(_before_config, path.iterdir()))):
        raise UserError(f"{path} exists and is not a run folder; choose another --out")
    with _locked(path) as alone:
        if file.exists():
            there = read_json(file)
            differ = [key for key in sorted(config.keys() | there.keys()) if config.get(key) != there.get(key)]
            differ.sort(key="corpus".__eq__)  # a setting rather than the fingerprint that follows from it
            if differ:
                was, now = there.get(differ[0]), config.get(differ[0])
                raise UserError(
                    f"{path} holds a run of another configuration ({differ[0]} was {was!r}, is {now!r}); choose another --out"
                )
        else:
            write_json(file, config)
        if alone:
            _remove_leftovers(path)
        yield RunFolder(path)


def _before_config(file: Path) -> bool:
    """Whether a run that was killed before it had written its configuration may have left this file."""
    return file.name == ".lock" or file.name.startswith(".config.json.")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Locks a folder, made if it is not there, against other processes; the system unlocks it when this one dies.

    Gives False on a file system without locks. Raises UserError where another process has the lock.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {path / '.lock'}: {error.strerror}") from error
    with lock:
        alone = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is open in another process; wait for its end or choose another --out") from None
        except OSError:
            alone = False
        yield alone


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left: temporary files of `write_atomically` and those that safetensors makes beside them
    (.tmp and six characters), and a last line of the log without its end."""
    log = path / "log.jsonl"
    try:
        for file in (*path.glob(".*.partial"), *path.glob(".tmp??????")):
            if not file.name.startswith(".report.html."):  # write_report needs no lock: its file may be alive
                file.unlink(missing_ok=True)
        if log.exists():
            os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}") from error


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, object]:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):  # installed from a wheel, or no git on the machine
        return {"commit": None, "dirty": None}
