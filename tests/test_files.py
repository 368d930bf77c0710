"""The one door for what a user names: paths and files of every kind, each read or refused in one clear line."""

import contextlib
import io
import os
import pwd
import socket
from pathlib import Path

import pytest

from kloss import files
from kloss.errors import UserError
from kloss.files import lines_of, opened, parse_json, read_json, read_tensors, shown, user_path, write_json


def refused(words, function, *arguments):
    with pytest.raises(UserError, match=words) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 2000
    return line


ODD_ENTRIES = {
    "folder": "is a folder",
    "fifo": "is a FIFO",
    "socket": "is a socket",
    "device": "is a device",
    "broken": "is a broken link",
    "circle": "Too many levels of symbolic links",
}


def make_odd_entry(path: Path, kind: str) -> str:
    """Make what is no readable regular file. Returns words of its refusal."""
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as bound:
            bound.bind(".socket")  # a socket's name has at most 107 bytes
        (path.parent / ".socket").rename(path)
    else:
        path.symlink_to({"device": "/dev/zero", "broken": "nowhere", "circle": path.name}[kind])
    return ODD_ENTRIES[kind]


def test_only_regular_files_are_read(tmp_path):
    write_json(tmp_path / "good", {"a": "ü"})
    (tmp_path / "link").symlink_to("good")
    assert read_json(tmp_path / "link") == {"a": "ü"}
    for kind in ODD_ENTRIES:
        words = make_odd_entry(tmp_path / f"{kind}.json", kind)
        for reader in (read_json, read_tensors):
            assert f"{kind}.json" in refused(words, reader, tmp_path / f"{kind}.json")
    refused("does not exist", read_json, tmp_path / "nothing")
    refused("embedded null byte", read_json, tmp_path / "a\0b")
    refused("File name too long", read_json, tmp_path / ("a" * 256))
    refused("Not a directory", read_json, tmp_path / "good" / "b")


@contextlib.contextmanager
def unprivileged():
    """Whoever runs the tests, root may read everything: nobody may not."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_may_not_be_read(tmp_path):
    write_json(tmp_path / "a", {})
    os.chmod(tmp_path / "a", 0)
    with unprivileged():
        refused("cannot read .*: Permission denied", read_json, tmp_path / "a")
    os.chmod(tmp_path, 0)
    with unprivileged():
        refused("cannot use --data .*: Permission denied", user_path, tmp_path / "a", "--data")
    os.chmod(tmp_path, 0o700)


def test_an_error_while_reading_is_one_line(tmp_path):
    write_json(tmp_path / "a", {})
    with pytest.raises(UserError, match="cannot read .*a: Input/output error"), opened(tmp_path / "a"):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "text, words",
    [
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' * 100_000, "recursion"),
        (b"1" * 5000, "4300 digits"),
        (b"\xff\xff{}", "can't decode"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
        (b"[1]", "type list, an object is needed"),
    ],
)
def test_what_is_no_json(tmp_path, text, words):
    (tmp_path / "a.json").write_bytes(text)
    assert "a.json" in refused(words, read_json, tmp_path / "a.json")


def test_sizes_have_limits(tmp_path, monkeypatch):
    with open(tmp_path / "a.json", "wb") as sparse:
        sparse.truncate(1 << 40)
    monkeypatch.setattr(files, "JSON_BYTES", 1000)
    refused("more than 1,000 bytes", read_json, tmp_path / "a.json")
    monkeypatch.setattr(files, "LINE_BYTES", 3)
    assert list(lines_of(io.BytesIO(b"abc\n"[1:] + b"\nab"), "x")) == [(1, b"bc\n"), (2, b"\n"), (3, b"ab")]
    refused("^x:2: the line has more than 3 bytes", list, lines_of(io.BytesIO(b"a\nabcd"), "x"))


def test_parse_json_says_where():
    assert parse_json(b'{"a": [1]}', "x:1: not JSON") == {"a": [1]}
    refused("^x:1: not JSON: ", parse_json, "{", "x:1: not JSON")


def test_shown():
    assert shown("a ü 東 '\"\\") == "a ü 東 '\"\\"
    assert shown("a\nb\x1b\udcff\u2028") == r"a\nb\x1b\udcff\u2028"
    assert shown("a" * 150 + "b" * 150) == "a" * 100 + "…" + "b" * 100
    assert len(shown("\U000e0001" * 10**6)) == 201


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a" and user_path("a/b") == Path("a/b") and user_path(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    assert user_path(tmp_path / "file" / "a") == tmp_path / "file" / "a"  # it is not there; whoever needs it says so
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    for given, words in (
        ("", "--out is empty"),
        ("~nosuchuser/a", "--out ~nosuchuser/a: no home folder"),
        ("a\0b", r"--out a\\x00b is no path: embedded null byte"),
        ("a\ud800", "is no path"),
        ("a" * 256, "--out a.*: File name too long"),
        (f"{tmp_path}/none/{'ü' * 128}", "a name has at most 255 bytes"),
        (f"{tmp_path}/none/" + "a/" * 2100, "File name too long"),
        (circle, "Too many levels"),
        (circle / "a", "Too many levels"),
    ):
        refused(words, user_path, given, "--out")


def test_a_user_without_a_home(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    refused("^--cache ~/.cache: no home folder", user_path, "~/.cache", "--cache")
