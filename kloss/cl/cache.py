"""Folders that are either whole or not there, named by a hash of all that decides what is in them."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


def cache_folder(cache: str | Path | None = None) -> Path:
    """The cache, made if it is not there: the folder given, else $XDG_CACHE_HOME/kloss, else ~/.cache/kloss.

    Raises UserError where it cannot be made.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kloss"
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {cache} as the cache folder ({error.strerror})") from error
    return Path(cache).resolve()


def key(*parts) -> str:
    """32 hex digits that name the parts; they must print alike whenever they are alike."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def hash_files(files: list[Path]) -> str:
    """32 hex digits of the names and contents of files."""
    contents = []
    for file in files:
        with open(file, "rb") as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        contents.append((file.name, content.hexdigest()))
    return key(contents)


def temporary_folder(cache: Path) -> Path:
    """A fresh folder in the cache to write in; what killed writers left there is removed after a day."""
    for left in cache.glob(".tmp-*"):
        try:
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left)
        except FileNotFoundError:  # another process was faster
            continue
    return Path(tempfile.mkdtemp(dir=cache, prefix=".tmp-"))


@contextmanager
def written(final: Path) -> Iterator[Path]:
    """A fresh folder to write in, which is `final` behind the block; where another process was first, its folder stays.

    What a failed block wrote is removed. Raises UserError where the file system refuses (full disk, no permission).
    """
    temporary = temporary_folder(final.parent)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        try:
            os.rename(temporary, final)
        except OSError:
            if not final.is_dir():
                raise
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
