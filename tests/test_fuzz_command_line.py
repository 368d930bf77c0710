"""Fuzz the command line: random flags with odd values end with a plan or one short line, never a traceback, and soon.

Nothing is trained: every case is a --dry-run. KLOSS_FUZZ=5 tries five times as many.
"""

import contextlib
import io
import os
from collections import Counter
from dataclasses import fields
from typing import get_type_hints

import pytest
from helpers import fuzz_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz_readers import at_most
from test_run import PATHS, SMALL

from kloss.config import Config
from kloss.run import main

NUMBERS = [
    "0",
    "1",
    "2",
    "7",
    "-1",
    "-0",
    "1.5",
    "1e-3",
    "1e400",
    "-1e400",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e-320",
    "9" * 30,
    "9" * 5000,
]
NUMBERS += [
    "9223372036854775808",
    "18446744073709551616",
    "1_0",
    "0x10",
    "1,5",
    "٣",
    "½",
    "",
    " ",
    " 1",
    "1 2",
    "True",
    "None",
    "-",
    "--",
]
WORDS = [
    "",
    " ",
    "en-US",
    "en_US",
    "xx-YY",
    "en-US,de-DE",
    "script",
    "family",
    "shared",
    "paper",
    "bf16",
    "auto",
    "None",
    "a\nb",
    "\x1b[31m",
]
WORDS += ["[red]x[/red]", "😀", "\udcff", "\ud800", "a\0b", "x" * 5000, "{}", "--", "-h", "*", "%s", "@file", "=", "''"]
FOLDERS = [
    "",
    ".",
    "./file",
    "./file/x",
    "./fifo",
    "./circle",
    "./circle/x",
    "./broken",
    "./zeros",
    "./none/none",
    "./[red]",
    "a\nb",
]
FOLDERS += [
    "a\0b",
    "~nosuchuser/x",
    "~",
    "x" * 300,
    "x/" * 2100,
    "none/" + "x" * 300,
    "\udcff",
    "\ud800",
]  # none is an id of the hub
KINDS = get_type_hints(Config)
LEAVE = {"dry_run", "preset", "device"}  # a preset with a hub's data and backbone would ask the network


@st.composite
def flags(draw):
    """One flag with its values, as a shell would give it."""
    name = draw(st.sampled_from([f.name for f in fields(Config) if f.name not in LEAVE]))
    number = "int" in str(KINDS[name]) or "float" in str(KINDS[name])
    pool = st.sampled_from(FOLDERS if name in PATHS else NUMBERS if number else WORDS)
    if name not in PATHS and draw(st.integers(0, 9)) == 7:
        pool = st.sampled_from(NUMBERS + WORDS) | st.text(max_size=5)
    values = draw(st.lists(pool, max_size=3) if draw(st.integers(0, 5)) == 2 else st.lists(pool, min_size=1, max_size=1))
    flag = f"--{name.replace('_', draw(st.sampled_from('-_')))}"
    if draw(st.integers(0, 19)) == 13:
        flag = draw(st.sampled_from([flag[:-1], flag + "s", flag.upper(), f"--no-{name}", "-" + name[0], "--together", "--help"]))
    return [f"{flag}={values[0]}"] if values and draw(st.booleans()) else [flag, *values]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with odd entries, and a cache that has the small corpus."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_text("x")
    os.mkfifo(folder / "fifo")
    for name, target in (("circle", "circle"), ("broken", "nowhere"), ("zeros", "/dev/zero")):
        (folder / name).symlink_to(target)
    assert ended([*SMALL, "--cache", str(folder / "cache"), "--dry-run"])[0] == 0
    return folder


def ended(arguments):
    """The command's exit status, whether it returned or the parser ended it, and its stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(30):
        try:
            status = main(arguments)
        except SystemExit as end:
            return end.code, None, err.getvalue()
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def statuses():
    counts = Counter()
    yield counts
    print(f"fuzzed: {dict(counts)}")
    assert min(counts["plan"], counts["refused"], counts["parser"]) >= 0.03 * counts.total(), counts


CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(max_examples=fuzz_examples(200), derandomize=True, database=None, deadline=None, suppress_health_check=CHECKS)
@given(given_flags=st.lists(flags(), min_size=1, max_size=2))
def test_command_line(place, monkeypatch, statuses, given_flags):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place / "home"))
    arguments = [*SMALL, "--cache", str(place / "cache"), *(word for words in given_flags for word in words)]
    status, out, err = ended([*arguments, "--dry-run"])
    assert status in (0, 2) and "Traceback" not in err
    if status == 0:
        assert out is None or "learners" in out
        statuses["plan"] += 1
    elif out is None:
        statuses["parser"] += 1
    else:
        assert err.startswith("kloss: ") and err.count("\n") == 1 and len(err) < 2100, err
        statuses["refused"] += 1
