"""A run folder's files within its page, as data: URIs, so that they travel with it."""

import base64
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..files import opened

NAMES = ("scores.csv", "slots.csv", "scores.json", "config.json", "env.json", "log.jsonl")
PLAIN, LARGEST = 1 << 17, 1 << 25  # bytes: above the first a file is compressed, above the second it stays beside the page


class Download(NamedTuple):
    name: str
    size: str
    address: str  # a data: URI


def files_of(folder: Path) -> tuple[Sequence[Download], Sequence[str]]:
    """The files of NAMES that are there, and the names of those that are too large. Raises UserError for one not to be read."""
    within, beside = [], []
    for name in NAMES:
        file = folder / name
        if not file.exists():
            continue
        if file.stat().st_size > LARGEST:
            beside.append(name)
            continue
        with opened(file) as stream:
            content = stream.read()
        if len(content) > PLAIN:
            name, content = f"{name}.gz", gzip.compress(content, mtime=0)  # no time: the same run, the same page
        data = base64.b64encode(content).decode()
        within.append(Download(name, f"{-(-len(content) // 1000)} kB", f"data:application/octet-stream;base64,{data}"))
    return within, beside
