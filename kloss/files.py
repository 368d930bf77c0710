"""Files and folders that are either whole or absent: written under a temporary name, flushed, then renamed.

And the one door for what a user names: `user_path` for a path, `opened` for a file, `lines_of` and `parse_json` for its text.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and a report does without it
    from torch import Tensor

LINE_BYTES = 16 << 20  # of a line of text
JSON_BYTES = 1 << 30  # of a JSON file
NAME_BYTES = 255  # of a file's name; Linux's file systems take no more
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def shown(text: object, most: int = 200) -> str:
    """Return text for a message: on one line, what is not printable escaped, the middle left out where it has over `most`."""

    def ends(line: str) -> str:
        return line if len(line) <= most else f"{line[: most // 2]}…{line[-(most // 2) :]}"

    return ends("".join(c if c.isprintable() else ascii(c)[1:-1] for c in ends(str(text))))


def user_path(given: str | Path, flag: str = "") -> Path:
    """Return a path as a user gave it, `~` expanded; nothing has to be there.

    flag: what it was given for, for messages.
    Raises UserError for a path that no file can have or nobody can look at: empty, too long, with a NUL, of an unknown user, in a
    folder without permission, through links in a circle.
    """
    named = f"{flag} {shown(given, 500)}".lstrip()
    if not str(given):
        raise UserError(f"{flag or 'the path'} is empty")
    try:
        path = Path(given).expanduser()
        names = os.fsencode(path).split(b"/")
        path.stat()
    except RuntimeError:
        raise UserError(f"{named}: no home folder is known for it; write the path without ~") from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"cannot use {named}: {error.strerror}") from error
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise UserError(f"{named} is no path: {shown(error)}") from error
    if max(map(len, names)) > NAME_BYTES:  # within a folder that is not there yet, where stat does not see it
        raise UserError(f"cannot use {named}: a name has at most {NAME_BYTES} bytes")
    return path


@contextlib.contextmanager
def leaving_pipes() -> Iterator[None]:
    """Run a command. If the reader of its output leaves (`| head`), it ends with 128 + SIGPIPE and says nothing, as others do."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest at its end
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading, as bytes.

    Raises UserError for what is missing or may not be read, and for what is no regular file: a FIFO or a device may never end.
    """
    name = shown(path, 500)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{name} is a broken link" if os.path.islink(path) else f"{name} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise UserError(f"cannot read {name}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{name} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, a regular file is needed")
    try:
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error


def lines_of(stream: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Give (number from 1, content) of the stream's lines. Raises UserError for one of more than LINE_BYTES.

    name: of the stream, for messages.
    """
    for number, line in enumerate(iter(functools.partial(stream.readline, LINE_BYTES + 1), b""), 1):
        if len(line) > LINE_BYTES:
            raise UserError(f"{name}:{number}: the line has more than {LINE_BYTES:,} bytes")
        yield number, line


def parse_json(text: str | bytes, complaint: str) -> Any:
    """Parse JSON. Raises UserError, beginning with `complaint`, for what is none: no text, a number too long, nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{complaint}: {shown(error)}") from error


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
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
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


def logs(path: Path) -> list[Path]:
    """The logs of a run folder's processes."""
    return [file for file in sorted(path.glob("log*.jsonl")) if re.fullmatch(r"log(-\d+)?\.jsonl", file.name)]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically. Raises ValueError for NaN, which JSON lacks."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError for a file that is missing, unreadable, too large or not JSON."""
    with opened(path) as stream:
        text = stream.read(JSON_BYTES + 1)
    if len(text) > JSON_BYTES:
        raise UserError(f"{shown(path, 500)} has more than {JSON_BYTES:,} bytes")
    value = parse_json(text, f"{shown(path, 500)} is not readable JSON")
    if not isinstance(value, dict):
        raise UserError(f"{shown(path, 500)} holds JSON of type {type(value).__name__}, an object is needed")
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

    with opened(path):  # refuses what is no regular file
        pass
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from error
