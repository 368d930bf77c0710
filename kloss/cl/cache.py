"""The cache: where it is, its entries' names (hashes of everything that decides their contents), how they are made and opened."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import temporary_folder, write_json, written

SEAL = "kloss-entry.json"  # the file of an entry with the digest of all others


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the cache folder, made if absent: `cache` if given, else $XDG_CACHE_HOME/kloss, else ~/.cache/kloss.

    Raises UserError where it cannot be made.
    """
    try:
        folder = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kloss")
    except RuntimeError as error:
        raise UserError("this user has no home folder to keep a cache in; set HOME or choose a folder with --cache") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot use {str(folder)!r} as the cache folder ({reason})") from error


def open_entry(folder: Path, make: Callable[[Path], object], progress: Callable | None, **about: object) -> dict[str, Any]:
    """Open an entry of the cache. One that is absent is made, one that is not what was written is moved away and made again.

    make: called as make(temporary), writes the files of the entry into the folder `temporary`.
    progress: its `say` gets the warning that an entry is made again; without it, Python's `warnings` do.
    about: JSON that is kept with an entry that is made; unlike its name, it decides nothing.
    Returns what was kept with the entry.
    Raises UserError where the cache cannot be read or written; an entry that may not be read is no damaged one.
    """
    try:
        kept = _kept(folder)
        if kept is None and os.path.lexists(folder):
            reason = "is damaged" if (folder / SEAL).exists() else f"has no {SEAL} (earlier versions wrote none)"
            _move_away(folder, reason)
            getattr(progress, "say", warnings.warn)(f"{folder} {reason}; it is made again")
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; choose another --cache") from error
    if kept is None:
        with written(folder, folder=True) as temporary:
            make(temporary)
            write_json(temporary / SEAL, {"digest": _digest(temporary, about), "about": about})
        kept = _kept(folder)  # of another process, if that was faster
        assert kept is not None, f"{folder} changed as soon as it was written"
    return kept


def _kept(folder: Path) -> dict[str, Any] | None:
    """Return what is kept with an entry; None if there is none or its digest is not that of its files."""
    try:
        if not (folder / SEAL).is_file():
            return None
        seal = json.loads((folder / SEAL).read_bytes())
        return seal["about"] if seal["digest"] == _digest(folder, seal["about"]) else None
    except (FileNotFoundError, NotADirectoryError):  # another process moved it away
        return None
    except (ValueError, RecursionError, TypeError, KeyError):  # no JSON, or not such JSON
        return None


def _digest(folder: Path, about: object) -> str:
    return key(hash_files(sorted(file for file in folder.iterdir() if file.is_file() and file.name != SEAL)), about)


def _move_away(folder: Path, reason: str) -> None:
    """Move a damaged entry to where a later process removes it."""
    try:
        os.rename(folder, temporary_folder(folder.parent) / "damaged")
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        text = f"{folder} {reason} and cannot be moved away ({error.strerror}); remove it or choose another --cache"
        raise UserError(text) from error


def key(*parts: object) -> str:
    """Return a cache key, 32 hex digits: the hash of `repr(parts)`. Parts need a deterministic repr."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def hash_files(files: list[Path]) -> str:
    """Return 32 hex digits that depend on the files' names and contents."""
    contents = []
    for file in files:
        with open(file, "rb") as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        contents.append((file.name, content.hexdigest()))
    return key(contents)
