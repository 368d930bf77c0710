"""What a person sees in a terminal or log: progress with time left, the plan, the table at the end, one line for a mistake."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

EVERY = 30  # seconds between the lines of a log


class Bar:
    """Shows (done, total, text); a total that is not known is 0. A new total or kind of text starts a new line."""

    def __init__(self, progress: Progress):
        self.progress, self.task, self.kind = progress, None, None

    def __call__(self, done: int, total: int, text: str) -> None:
        kind = (text.split(",")[0], total)
        if kind != self.kind:
            if self.task is not None:
                self.progress.update(self.task, total=1, completed=1)
            self.task, self.kind = self.progress.add_task(escape(text), total=total or None), kind
        self.progress.update(self.task, completed=done, description=escape(text))

    def say(self, text: str) -> None:
        self.progress.console.print(escape(text), style="yellow", highlight=False)


class Lines:
    """Takes what `Bar` takes, where there is no terminal: plain lines, one every 30 s and one at the end of a kind of work."""

    def __init__(self, console: rich.console.Console, clock: Callable[[], float] = time.monotonic):
        self.console, self.clock = console, clock
        self.kind, self.done, self.total, self.text, self.ended = None, 0, 0, "", True

    def __call__(self, done: int, total: int, text: str) -> None:
        kind, now = text.split(",")[0], self.clock()
        other_total = total != self.total and self.done > 0  # a total may become known, or unknown, before anything is done
        if kind != self.kind or other_total or done < self.done:
            self.end()
            self.kind, self.ended = kind, False
            self.started = self.printed = now
            self.passed = done  # as last printed; above 0 at the start where a stopped run goes on
        self.done, self.total, self.text = done, total, text
        if total and done >= total:
            self.end()
        elif now - self.printed >= EVERY:
            # By the rate since the last line: the last learner alone is slower than fifty together were.
            left = (now - self.printed) * (total - done) / (done - self.passed) if total and done > self.passed else None
            self.printed, self.passed = now, done
            self._print(now, left)

    def end(self) -> None:
        """Says how far the present kind of work came and how long it took, unless that is said already."""
        if not self.ended:
            self.ended = True
            self._print(self.clock(), None)

    def say(self, text: str) -> None:
        self.console.out(text, highlight=False)

    def _print(self, now: float, left: float | None) -> None:
        parts = [_duration(now - self.started)]
        if self.done:
            parts.insert(0, f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}")
        if left is not None:
            parts.append(f"{_duration(left)} left")
        self.say(f"{self.text}: {', '.join(parts)}")


class Console:
    """The terminal, or a plain log where there is none."""

    def __init__(self):
        self.out, self.err = rich.console.Console(), rich.console.Console(stderr=True)

    @contextmanager
    def progress(self) -> Iterator[Bar | Lines]:
        """A progress display, live while the block runs; in a log, lines."""
        if not (self.out.is_interactive or self.out.is_jupyter):
            lines = Lines(self.out)
            try:
                yield lines
            finally:
                lines.end()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.out, refresh_per_second=4) as progress:
            yield Bar(progress)

    def plan(self, lines: Sequence[tuple[str, str]]) -> None:
        table = Table(show_header=False, box=None)
        for name, text in lines:
            table.add_row(f"[bold]{name}", escape(text))
        self.out.print(table)

    def results(self, rows: Sequence[dict], report: Path) -> None:
        """The strategies' means with 95 % intervals over orders and seeds, and where the report is."""
        table = Table(title="F1 in points, CFT and CBT as differences; 95 % intervals over orders and seeds")
        for name in ("strategy", "runs", "F1", "CFT", "CBT", "weights trained"):
            table.add_column(name, justify="left" if name == "strategy" else "right")
        for row in rows:
            cells = [_interval(row, "f1", 100), _interval(row, "cft", 1), _interval(row, "cbt", 1)]
            table.add_row(escape(row["label"]), str(row["runs"]), *cells, f"{row['trainable_parameters']:,}")
        self.out.print(table)
        self.out.print(f"report: {report}", highlight=False, soft_wrap=True)

    def error(self, text: str) -> None:
        self.err.print(f"kloss: {escape(text)}", style="red", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h"""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _interval(row: dict, name: str, scale: float) -> str:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or math.isnan(value):
        return "–"
    digits = 1 if scale == 100 else 3
    text = f"{value * scale:.{digits}f}"
    return text if low is None else f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"
