"""Files and folders that are either whole or absent: written under a temporary name, flushed, then renamed."""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and a report does without it
    from torch import Tensor


@contextlib.contextmanager
def written(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Give a temporary path to write at, renamed to `path` after the block. If anything fails, `path` stays as it was.

    A file replaces an older one. With `folder`, the temporary path is a new folder, and the first of several processes wins.
    Raises UserError where the file system refuses (full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            temporary = temporary_folder(path.parent)
        yield temporary
        for file in temporary.rglob("*") if folder else (temporary,):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        try:
            os.replace(temporary, path)
        except OSError:
            if not folder or not path.is_dir():
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there is unchanged") from error
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_folder(parent: Path) -> Path:
    """Make a temporary folder in `parent`; remove those that killed processes left there more than a day ago.

    Its permissions are the umask's, since it becomes an entry of a cache that users may share; tempfile's folders are private.
    """
    for leftover in parent.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            if time.time() - leftover.stat().st_mtime > 86400:
                shutil.rmtree(leftover)
    temporary = parent / f".tmp-{secrets.token_hex(8)}"
    temporary.mkdir()
    return temporary


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically. Raises ValueError for NaN, which JSON lacks."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError for a file that is missing, unreadable or not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # no text, no JSON, a number too long, nested too deep
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds JSON of type {type(value).__name__}, an object is needed")
    return value


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written(path) as temporary:
        temporary.touch()
        permissions = temporary.stat().st_mode  # the umask's; save_file would leave the file private
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        temporary.chmod(permissions)


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read all tensors of a safetensors file. Raises UserError for one that is missing, cut short or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from error
