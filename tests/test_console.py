"""What a log shows of a run: few lines, whole ones, and the text as it was given."""

import io

import pytest
import rich.console

from kloss.console import EVERY, Bar, Console, Lines


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    """(lines, read): the object under test, and a function that gives what it has printed since."""
    file = io.StringIO()
    lines = Lines(rich.console.Console(file=file, width=40), clock)

    def read():
        text = file.getvalue()
        file.seek(0)
        file.truncate()
        return text.splitlines()

    return lines, read


def test_a_line_every_thirty_seconds_and_one_at_the_end(log, clock):
    lines, read = log
    printed = []
    for step in range(401):
        clock.now = 1000 + step * 0.375
        lines(step, 400, f"warming up the tiny backbone, loss {4 - step / 400:.2f}")
        printed += [(step, line) for line in read()]
    assert printed == [
        (80, "warming up the tiny backbone, loss 3.80: 80/400, 30 s, 120 s left"),
        (160, "warming up the tiny backbone, loss 3.60: 160/400, 60 s, 90 s left"),
        (240, "warming up the tiny backbone, loss 3.40: 240/400, 90 s, 60 s left"),
        (320, "warming up the tiny backbone, loss 3.20: 320/400, 120 s, 30 s left"),
        (400, "warming up the tiny backbone, loss 3.00: 400/400, 150 s"),
    ]
    lines.end()
    lines(400, 400, "warming up the tiny backbone, loss 3.00")
    assert read() == []


def test_a_run_taken_up_again_does_not_count_what_was_done_before(log, clock):
    lines, read = log
    lines(9_000, 10_000, "5 learners, 5 training, loss 1.0")
    clock.now += 100
    lines(9_200, 10_000, "5 learners, 4 training, loss 1.0")
    assert read() == ["5 learners, 4 training, loss 1.0: 9,200/10,000, 100 s, 400 s left"]


def test_the_time_left_follows_a_change_of_pace(log, clock):
    lines, read = log
    lines(0, 10_000, "53 learners")
    clock.now += EVERY
    lines(6_000, 10_000, "53 learners")
    clock.now += EVERY
    lines(7_000, 10_000, "53 learners")
    assert read() == ["53 learners: 6,000/10,000, 30 s, 20 s left", "53 learners: 7,000/10,000, 60 s, 90 s left"]


def test_each_kind_of_work_has_its_end(log, clock):
    lines, read = log
    lines(0, 1, "training a tokenizer")
    clock.now += 45
    lines(0, 1, "reading massive")  # no total yet
    assert read() == ["training a tokenizer: 45 s"]
    clock.now += EVERY - 1
    lines(20_000, 0, "reading massive")
    assert read() == []
    clock.now += 1
    lines(40_000, 0, "reading massive")
    assert read() == ["reading massive: 40,000, 30 s"]
    clock.now += 5
    lines(0, 100, "tokenising words")
    assert read() == ["reading massive: 40,000, 35 s"]
    lines(100, 100, "tokenising words")
    assert read() == ["tokenising words: 100/100, 0 s"]
    for total in (300, 200, 200):  # cohorts and learners of one name
        lines(100, total, "2 learners, 1 training")
        clock.now += 2
    lines(150, 200, "2 learners, 1 training")
    lines(20, 200, "2 learners, 2 training")
    assert read() == ["2 learners, 1 training: 100/300, 2 s", "2 learners, 1 training: 150/200, 4 s"]
    lines.end()
    assert read() == ["2 learners, 2 training: 20/200, 0 s"]


def test_long_times_are_in_minutes_and_hours(log, clock):
    lines, read = log
    for seconds, text in ((560, "560 s, 560 s left"), (600, "10 min, 10 min left"), (7200, "2.0 h, 2.0 h left")):
        lines(0, 100, f"learning for {seconds}")
        read()
        clock.now += seconds
        lines(50, 100, f"learning for {seconds}")
        assert read() == [f"learning for {seconds}: 50/100, {text}"]


def test_text_is_text(log, clock):
    lines, read = log
    text = "reading [bold]my [/folder] :warning: [0] with a name that is longer than the forty columns \\"
    lines(1, 1, text)
    lines.say(text)
    assert read() == [f"{text}: 1/1, 0 s", text]


def test_the_console_gives_lines_to_a_log_and_a_bar_to_a_terminal(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with Console().progress() as progress:
        progress(1, 3, "half [done]")
        progress.say("a [remark] that would not fit into the eighty columns which rich takes a file to have, and so on")
    assert capsys.readouterr().out.splitlines() == [
        "a [remark] that would not fit into the eighty columns which rich takes a file to have, and so on",
        "half [done]: 1/3, 0 s",
    ]
    with pytest.raises(KeyboardInterrupt), Console().progress() as progress:
        progress(2, 3, "half [done]")
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "half [done]: 2/3, 0 s\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Console().progress() as progress:
        assert type(progress) is Bar
        progress(3, 3, "all [done]")
    assert "all [done]" in capsys.readouterr().out
