"""A run folder: one process at a time, and nothing left of those that were killed."""

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
from contextlib import ExitStack

import pytest
import torch
from users import plain_user

from kloss.cl.rundir import open_run
from kloss.errors import UserError

CONFIG = {"seed": 0}
NO_PROCESS = 2**22 + 1  # beyond Linux's largest process id
LEFT = (".checkpoint.safetensors.4711.partial", ".scores.json.7.partial", ".tmpZZDWcX", f".report.html.{NO_PROCESS}.partial")


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
    # A report may be written by anyone, any time: by this process, by the system's first.
    reports = [f".report.html.{number}.partial" for number in (os.getpid(), 1, "x")]
    kept = (*reports, "checkpoint.safetensors", "mine.partial", ".tmp-mine")
    folder = made(tmp_path / "run", *LEFT, *kept)
    (folder / "adapters").mkdir()
    for name in (".adapter_model.safetensors.7.partial", "adapter_model.safetensors"):
        (folder / "adapters" / name).write_text("half")
    with open_run(folder, CONFIG):
        assert names(folder) == sorted((".lock", "adapters", "config.json", *kept))
        assert names(folder / "adapters") == ["adapter_model.safetensors"]


def test_a_job_of_several_processes_is_open_until_all_have_ended(tmp_path):
    with ExitStack() as second:
        with open_run(tmp_path, CONFIG, 0, 2) as first:
            second.enter_context(open_run(tmp_path, CONFIG, 1, 2))
            assert first.checkpoint.name == "checkpoint-0-of-2.safetensors"
        for process in ((0, 1), (0, 2)):  # the first has ended, the second has not
            with pytest.raises(UserError, match="open in another process"), open_run(tmp_path, CONFIG, *process):
                pass
    with open_run(tmp_path, CONFIG):
        pass


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


WRITES = {
    "log": lambda run: run.log(step=1),
    "checkpoint": lambda run: run.save_checkpoint({"param": torch.zeros(2)}, {}),
    "environment": lambda run: run.write_environment(torch.device("cpu")),
    "scores": lambda run: run.save_scores({}),
}


def removed(folder):
    shutil.rmtree(folder)


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


def begun_again(folder):
    shutil.rmtree(folder)
    made(folder)


def without_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("change", [removed, emptied, begun_again, without_config])
def test_a_run_folder_that_is_gone_is_not_made_anew(tmp_path, change, write):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="run folder .* is gone"), open_run(folder, CONFIG) as run:
        change(folder)
        left = names(folder) if folder.exists() else None
        WRITES[write](run)
    assert (names(folder) if folder.exists() else None) == left


def test_a_run_folder_removed_at_the_very_end_is_no_success(tmp_path):
    with pytest.raises(UserError, match="run folder .* is gone"), open_run(tmp_path / "run", CONFIG):
        removed(tmp_path / "run")


@pytest.mark.parametrize("write", WRITES)
def test_a_run_folder_that_becomes_read_only_loses_nothing(tmp_path, write):
    with plain_user() as place:
        folder = place / "run"
        with open_run(folder, CONFIG) as run:
            for write_before in WRITES.values():
                write_before(run)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(UserError, match=f"cannot write {folder}.*: Permission denied"), open_run(folder, CONFIG) as run:
            (folder / "log.jsonl").chmod(0o444)
            folder.chmod(0o555)
            WRITES[write](run)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        folder.chmod(0o755)
        (folder / "log.jsonl").chmod(0o644)
        with open_run(folder, CONFIG) as run:
            WRITES[write](run)


@pytest.mark.parametrize(
    "closed, mode, words",
    [
        (".lock", 0o444, "cannot write .*lock: Permission denied"),
        (".", 0o555, "cannot write .*: Permission denied"),
        (".", 0o000, "cannot open .*: Permission denied; choose another --out"),
        ("config.json", 0o000, "cannot read .*config.json: Permission denied.*another --out"),
        ("log.jsonl", 0o000, "cannot write in .*: Permission denied"),
    ],
)
def test_a_run_folder_of_another_user(closed, mode, words):
    with plain_user() as place:
        folder = made(place / "run", LEFT[0])
        (folder / "log.jsonl").write_text("")
        (folder / closed).chmod(mode)
        with pytest.raises(UserError, match=words), open_run(folder, CONFIG) as run:
            WRITES["scores"](run)


def test_an_unreadable_checkpoint_is_no_damage():
    with plain_user() as place, open_run(place / "run", CONFIG) as run:
        WRITES["checkpoint"](run)
        (place / "run" / "checkpoint.safetensors").chmod(0)
        with pytest.raises(UserError, match="cannot read .*checkpoint.safetensors: .*ermission denied") as error:
            run.load_checkpoint()
        assert "delete" not in str(error.value)


def test_the_files_of_a_run_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with open_run(tmp_path / "run", CONFIG) as run:
            for write in WRITES.values():
                write(run)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "run").iterdir()} == {0o640}


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "{}"])
def test_a_damaged_configuration_says_what_to_do(tmp_path, text):
    folder = made(tmp_path / "run")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="(?s)config.json|another configuration.*--out") as error, open_run(folder, CONFIG):
        pass
    assert "another --out" in str(error.value)
    assert (folder / "config.json").read_text() == text


def test_a_fifo_for_a_checkpoint_is_refused_without_waiting(tmp_path):
    with open_run(tmp_path / "run", CONFIG) as run:
        os.mkfifo(run.path / "checkpoint.safetensors")
        with pytest.raises(UserError, match="checkpoint.safetensors is a FIFO"):
            run.load_checkpoint()
