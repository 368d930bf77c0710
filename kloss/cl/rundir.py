"""A run's folder: config.json, env.json, log.jsonl, checkpoint.safetensors, scores.json (written last: it means done)."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_json, write_json, write_tensors


class RunFolder:
    """Opens or creates a run folder for a configuration.

    folder: where. config: what decides the results, as JSON. Raises UserError where the folder holds another configuration.
    """

    def __init__(self, folder: str | Path, config: Mapping):
        self.path = Path(folder)
        config = json.loads(json.dumps(config))
        file = self.path / "config.json"
        if file.exists():
            there = read_json(file)
            differ = [key for key in sorted(config.keys() | there.keys()) if config.get(key) != there.get(key)]
            differ.sort(key="corpus".__eq__)  # a setting rather than the fingerprint that follows from it
            if differ:
                was, now = there.get(differ[0]), config.get(differ[0])
                raise UserError(
                    f"{self.path} holds a run of another configuration ({differ[0]} was {was!r}, is {now!r}); "
                    "choose another --out"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} exists and is not a run folder; choose another --out")
        else:
            write_json(file, config)
        self.started = time.time()

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
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        write_json(
            self.path / "env.json",
            {
                "command": " ".join(["python -m kloss.run", *sys.argv[1:]]),
                **_commit(),
                "python": platform.python_version(),
                **{name: _version(name) for name in ("kloss", "torch", "triton", "transformers", "datasets", "numpy")},
                "device": f"{device.type} ({name})",
                "threads": torch.get_num_threads(),
            },
        )


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
