"""Files that are either whole or not there: written beside their place, flushed, then renamed over it."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary path), then renames that file to path. Whatever goes wrong, what was at path stays as it was.

    Raises UserError where the file system refuses (full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there is unchanged") from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for UTF-8 text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """`write_atomically` for JSON; NaN is refused, since it is not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError where it is missing, unreadable or not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds JSON of type {type(value).__name__}, an object is needed")
    return value


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """`write_atomically` for a safetensors file; tensors are made contiguous first."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write)


def read_tensors(path: Path) -> dict:
    """All tensors of a safetensors file. Raises UserError for one that is missing, cut short or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from error
