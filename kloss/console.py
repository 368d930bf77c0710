"""What a terminal or log shows: progress with time left, the plan, the table of results, one line for a mistake."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

EVERY = 30  # seconds between the lines of a log


class Bar:
    """Progress bars, one for each kind of work. The kind is the text before its first comma; a total of 0 means unknown."""

    def __init__(self, progress: Progress):
        self.progress, self.task, self.kind = progress, TaskID(-1), ("", 0)
        self.others: dict[int, TaskID] = {}

    def __call__(self, done: int, total: int, text: str) -> None:
        kind = (text.split(",")[0], total)
        if kind != self.kind:
            if self.task >= 0:
                self.progress.update(self.task, total=1, completed=1)
            self.task, self.kind = self.progress.add_task(escape(text), total=total or None), kind
        self.progress.update(self.task, completed=done, description=escape(text))

    def beside(self, process: int, done: int, total: int, text: str) -> None:
        if process not in self.others:
            self.others[process] = self.progress.add_task("")
        self.progress.update(self.others[process], total=total, completed=done, description=escape(text))

    def say(self, text: str) -> None:
        self.progress.console.print(escape(text), style="yellow", highlight=False)


class Lines:
    """The same calls as `Bar`, without a terminal: a line every 30 s and one at the end of each kind of work."""

    def __init__(self, console: rich.console.Console, clock: Callable[[], float] = time.monotonic):
        self.console, self.clock = console, clock
        self.kind, self.done, self.total, self.text, self.ended = "", 0, 0, "", True
        self.started = self.printed = clock()

    def __call__(self, done: int, total: int, text: str) -> None:
        kind, now = text.split(",")[0], self.clock()
        other_total = total != self.total and self.done > 0  # before any work is done, a total may become known or unknown
        if kind != self.kind or other_total or done < self.done:
            self.end()
            self.kind, self.ended = kind, False
            self.started = self.printed = now
            self.passed = done  # as last printed; above 0 at first if a stopped run continues
        self.done, self.total, self.text = done, total, text
        if total and done >= total:
            self.end()
        elif now - self.printed >= EVERY:
            # Use the rate since the last line: the last learner alone is slower than fifty learners in one pass.
            left = (now - self.printed) * (total - done) / (done - self.passed) if total and done > self.passed else None
            self.printed, self.passed = now, done
            self._print(now, left)

    def end(self) -> None:
        """Print how far the current kind of work came and how long it took, once."""
        if not self.ended:
            self.ended = True
            self._print(self.clock(), None)

    def beside(self, process: int, done: int, total: int, text: str) -> None:
        """A line is too much for each; the first process's own ends when all do."""

    def say(self, text: str) -> None:
        self.console.out(text, highlight=False)

    def _print(self, now: float, left: float | None) -> None:
        details = [_duration(now - self.started)]
        if self.done:
            details.insert(0, f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}")
        if left is not None:
            details.append(f"{_duration(left)} left")
        self.say(f"{self.text}: {', '.join(details)}")


class Silent:
    """The same calls, and nothing is shown."""

    def __call__(self, done: int, total: int, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def beside(self, process: int, done: int, total: int, text: str) -> None:
        pass


class Others(Silent):
    """Of the processes beside the first: no progress, and messages with the process's number."""

    def __init__(self, console: rich.console.Console, rank: int):
        self.console, self.rank = console, rank

    def say(self, text: str) -> None:
        self.console.out(f"process {self.rank}: {text}", highlight=False)


class Console:
    """The terminal, or a plain log if there is none."""

    def __init__(self) -> None:
        self.out, self.err = rich.console.Console(), rich.console.Console(stderr=True)

    @contextmanager
    def progress(self, rank: int = 0) -> Iterator[Bar | Lines | Others]:
        """Show progress while the block runs: live bars in a terminal, lines in a log. rank: of this process."""
        if rank > 0:
            yield Others(self.out, rank)
            return
        if not (self.out.is_interactive or self.out.is_jupyter):
            lines = Lines(self.out)
            try:
                yield lines
            finally:
                lines.end()
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=self.out, refresh_per_second=4) as progress:
            yield Bar(progress)

    def plan(self, lines: Sequence[tuple[str, str]]) -> None:
        """Print (heading, text) lines as a table."""
        table = Table(show_header=False, box=None)
        for heading, text in lines:
            table.add_row(f"[bold]{heading}", escape(text))
        self.out.print(table)

    def summary(
        self, warnings: Sequence[str], rows: Sequence[dict], comparisons: Sequence[dict], advice: Sequence[str], report: Path
    ) -> None:
        """Print warnings, each strategy's means with 95 % intervals, paired differences, advice, and the report's path."""
        for line in warnings:
            self.out.print(escape(line), style="bold red", highlight=False, soft_wrap=True)
        table = Table(title="F1 in points, CFT and CBT as differences; 95 % intervals over different runs, tN: Student, N df")
        for name in ("strategy", "runs", "F1", "CFT", "CBT", "weights trained"):
            table.add_column(name, justify="left" if name == "strategy" else "right")
        for row in rows:
            cells = [_interval(row, "f1", 100), _interval(row, "cft", 1), _interval(row, "cbt", 1)]
            if row["can_forget"] == 0 and row["cbt"] is not None:
                cells[2] = "0 by design"
            runs = str(row["runs"]) if row["units"] == row["runs"] else f"{row['runs']}, {row['units']} different"
            table.add_row(escape(row["label"]), runs, *cells, f"{row['trainable_parameters']:,}")
        self.out.print(table)
        for row in comparisons:
            points = _interval(row, "difference", 100)
            text = f"{row['label']} minus {row['other']}: {points} points of final F1, paired ({row['units']} pairs)"
            self.out.print(escape(text), highlight=False, soft_wrap=True)
        for line in advice:
            self.out.print(escape(line), highlight=False, soft_wrap=True)
        self.out.print(f"report: {report}", highlight=False, soft_wrap=True)

    def error(self, text: str, rank: int = 0) -> None:
        """Print a line. rank: of this process."""
        text = escape(text) if rank == 0 else f"process {rank}: {escape(text)}"
        self.err.print(f"kloss: {text}", style="red", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h"""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _interval(row: dict, name: str, scale: float) -> str:
    value, low, high, df = (row[key] for key in (name, f"{name}_low", f"{name}_high", f"{name}_df"))
    if value is None or math.isnan(value):
        return "–"
    digits = 1 if scale == 100 else 3
    text = f"{value * scale:.{digits}f}"
    if low is None:
        return text
    return f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]" + ("" if df is None else f" t{df}")
