"""The cache: where it is, and its entries' names, which are hashes of everything that decides their contents."""

import hashlib
import os
from pathlib import Path

from ..errors import UserError


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the cache folder, made if absent: `cache` if given, else $XDG_CACHE_HOME/kloss, else ~/.cache/kloss.

    Raises UserError where it cannot be made.
    """
    folder = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kloss")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder} as the cache folder ({error.strerror})") from error
    return folder.resolve()


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
