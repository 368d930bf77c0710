"""A run folder: one process at a time, and nothing left of those that were killed."""

import errno
import fcntl
import json
import os
import signal

import pytest

from kloss.cl.rundir import open_run
from kloss.errors import UserError

CONFIG = {"seed": 0}
LEFT = (".checkpoint.safetensors.4711.partial", ".scores.json.7.partial", ".tmpZZDWcX")


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def made(folder, *files):
    """A run folder that a killed process left, with these files besides."""
    with open_run(folder, CONFIG):
        pass
    for name in files:
        (folder / name).write_text("half")
    return folder


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    # A report may be written by anyone, any time.
    kept = (".report.html.8.partial", "checkpoint.safetensors", "mine.partial", ".tmp-mine")
    folder = made(tmp_path / "run", *LEFT, *kept)
    with open_run(folder, CONFIG):
        assert names(folder) == sorted((".lock", "config.json", *kept))


def test_another_configuration_loses_nothing(tmp_path):
    folder = made(tmp_path / "run", *LEFT)
    with pytest.raises(UserError, match="seed was 0, is 1"), open_run(folder, {"seed": 1}):
        pass
    assert set(LEFT) <= set(names(folder))


def test_a_folder_is_open_in_one_process_until_that_ends_or_is_killed(tmp_path):
    folder = made(tmp_path / "run", *LEFT)
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with open_run(folder, CONFIG):
            (folder / LEFT[0]).write_text("being written")
            os.write(tell, b"!")
            signal.pause()
        os._exit(1)
    try:
        assert os.read(ready, 1) == b"!"
        with pytest.raises(UserError, match="is open in another process"), open_run(folder, CONFIG):
            pass
        assert (folder / LEFT[0]).read_text() == "being written"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pytest.raises(KeyboardInterrupt), open_run(folder, CONFIG):
        raise KeyboardInterrupt
    with open_run(folder, CONFIG):
        assert names(folder) == [".lock", "config.json"]


def test_without_locks_nobody_knows_what_is_left_over(tmp_path, monkeypatch):
    folder = made(tmp_path / "run", *LEFT)

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with open_run(folder, CONFIG):
        assert set(LEFT) <= set(names(folder))


def test_killed_before_the_configuration_was_written(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.12.partial").write_text("{")
    with open_run(tmp_path, CONFIG):
        assert names(tmp_path) == [".lock", "config.json"]


def test_a_line_of_the_log_cut_short_does_not_spoil_the_next(tmp_path):
    folder = made(tmp_path / "run")
    (folder / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with open_run(folder, CONFIG) as run:
        run.log(step=3)
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 3]
