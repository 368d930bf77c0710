"""--tensorboard: each learner's loss and F1, by its own steps."""

import errno
import json
import os
import sys
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from test_run import SMALL, one_line_error

from kloss.cl import boards, train
from kloss.cl.spans import f1_from_counts
from kloss.run import main


class Writer:
    """What torch's SummaryWriter is told, by folder: (tag, step) -> value; a purge drops what lies at and behind its step."""

    told: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    closed: list[str] = []

    def __init__(self, folder, purge_step):
        self.folder = folder
        kept = {key: value for key, value in self.told[folder].items() if key[1] < purge_step}
        self.told[folder] = kept

    def add_scalar(self, tag, value, step):
        assert (tag, step) not in self.told[self.folder], "written twice"
        self.told[self.folder][tag, step] = value

    def close(self):
        self.closed.append(self.folder)


def test_losses_and_f1_of_each_learner_through_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(boards, "writer", lambda: Writer)
    monkeypatch.setattr("kloss.run.writer", lambda: Writer)
    monkeypatch.setattr(boards, "SECONDS", 0.0)
    arguments = [*SMALL, "--cache", str(tmp_path / "cache"), "--strategies", "shared", "non-shared", "--score-every", "2"]
    arguments += ["--tensorboard", "--checkpoint-seconds", "1000"]  # a stopped run begins anew
    losses, original = {}, train._Team.advance

    def advance(team):
        if len(losses) == 7 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        result = original(team)
        losses[int(team.cohort.steps[0])] = team.cohort.losses[0]
        return result

    stopped = []
    monkeypatch.setattr(train._Team, "advance", advance)
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 130
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    names = sorted(Path(folder).name for folder in Writer.told)
    assert len(names) == 4 and names[0].startswith("0-3x1-from-") and names[1].startswith("1-") and "r=2" in names[1]
    assert set(Writer.closed) == set(Writer.told)
    (shared,) = (told for folder, told in Writer.told.items() if Path(folder).name == names[0])
    assert [step for tag, step in shared if tag == "loss"] == list(range(1, 19))  # 18 steps, each once
    assert [shared["loss", step] for step in range(1, 19)] == list(losses.values())
    (run, *others) = json.loads((tmp_path / "run" / "scores.json").read_text())["runs"]
    own = {step: value for (tag, step), value in shared.items() if tag == "F1/being learned"}
    assert list(own) == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    np.testing.assert_allclose([own[step] for step in (6, 12, 18)], np.diagonal(run["R"][1:]), rtol=1e-6)
    for entry in run["curves"]:
        count = entry["counts"][run["order"][entry["experience"] - 1]]
        assert own[entry["step"]] == pytest.approx(float(f1_from_counts([count])[0]))
    assert shared["F1/learned before", 18] == pytest.approx(np.mean(run["R"][3][:2])) and ("F1/learned before", 6) not in shared
    assert "tensorboard" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_without_the_package_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = one_line_error([*SMALL, "--tensorboard", "--out", str(tmp_path / "run")], capsys)
    assert "--tensorboard needs the package tensorboard: pip install tensorboard" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", ["__init__", "add_scalar", "close"])
def test_what_the_file_system_refuses_is_one_line_and_all_boards_are_closed(tmp_path, monkeypatch, capsys, call):
    """TensorBoard writes in threads, which raise as well as its writer does."""
    made, closed, shown = [], [], []

    class Refused:
        def __init__(self, folder, purge_step):
            made.append(folder)
            self.folder = folder
            self.refuse("__init__", len(made) == 2)

        def refuse(self, name, now=True):
            if name == call and now:
                thread = threading.Thread(target=self.fail)
                thread.start()
                thread.join()
                self.fail()

        def fail(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def add_scalar(self, tag, value, step):
            self.refuse("add_scalar")

        def close(self):
            closed.append(self.folder)
            self.refuse("close")

    monkeypatch.setattr(boards, "writer", lambda: Refused)
    monkeypatch.setattr("kloss.run.writer", lambda: Refused)
    monkeypatch.setattr(threading, "excepthook", hook := shown.append)
    line = one_line_error([*SMALL, "--tensorboard", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")], capsys)
    assert f"cannot write {tmp_path / 'run/tensorboard'}: No space left on device" in line
    assert set(closed) == set(made[:1] if call == "__init__" else made)
    assert not shown and threading.excepthook is hook


def test_torchs_writer_takes_it(tmp_path):
    pytest.importorskip("tensorboard")
    board = boards.writer()(str(tmp_path), purge_step=1)
    board.add_scalar("loss", 1.0, 1)
    board.close()
    assert any(tmp_path.iterdir())
