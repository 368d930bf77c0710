"""What `bench.crossover` prints and draws of its rows: tables, where a library is faster than kloss, maps of the ratios."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .libraries import FLOOR, KLOSS

Ratios = dict[tuple[int, int], float]


def printed(table: str, rows: Sequence[dict]) -> list[str]:
    """A table's lines. rows: its own."""
    if not rows:
        return []
    lines = {"skew": _skew, "memory": _memory}.get(table, _grids)(rows)
    return [f"\n== {table}: {ABOUT[table]}", *lines]


ABOUT = {
    "training": "forward and backward of a linear",
    "inference": "forward, without dropout",
    "shapes": "forward and backward at other widths and ranks",
    "compiled": "forward, with torch.compile for one shape alone",
    "skew": "forward and backward, rows of adapters by Zipf's law against equally many, the same in all",
    "memory": "the most that a call takes beyond inputs and weights",
}


def peers(rows: Sequence[dict]) -> list[str]:
    """The libraries in rows, but kloss."""
    return [name for name in dict.fromkeys(name for row in rows for name in row["ratio"])]


def _grids(rows: Sequence[dict]) -> list[str]:
    """For each library its ratios, adapters down and rows across; widths and ranks where all rows have the same of those."""
    down, across, title = "adapters", "rows", "adapters  rows of each: "
    if len({(row["adapters"], row["rows"]) for row in rows}) == 1 < len(rows):
        down, across, title = "width", "rank", "   width  rank:         "
    lines = []
    for peer in peers(rows):
        ratios = {(row[down], row[across]): row["ratio"][peer] for row in rows if peer in row["ratio"]}
        lines += ["", f"{peer}, time / kloss's", *grid(ratios, title)]
    return lines + [""] + [crossover(rows, peer, down, across) for peer in peers(rows) if peer != FLOOR]


def grid(ratios: Ratios, title: str) -> list[str]:
    """A library's ratios as a table's lines."""
    down, across = ([*dict.fromkeys(key[i] for key in ratios)] for i in (0, 1))
    across.sort()
    lines = [title + "".join(f"{n:>8}" for n in across)]
    for g in down:
        cells = (f"{ratios[g, n]:.2f}" if (g, n) in ratios else "" for n in across)
        lines.append(f"{g:>8}{'':{len(title) - 8}}" + "".join(f"{cell:>8}" for cell in cells))
    return lines


def crossover(rows: Sequence[dict], peer: str, down: str = "adapters", across: str = "rows") -> str:
    """Where a library is faster than kloss, in words."""
    lost = [row for row in rows if peer in row["ratio"] and row["ratio"][peer] < 1]
    of = sum(peer in row["ratio"] for row in rows)
    if not lost:
        return f"{peer}: kloss is faster" + f" in all {of} cells" * (of > 1)
    cells = ", ".join(f"{row[down]} x {row[across]} ({row['ratio'][peer]:.2f})" for row in lost)
    return f"{peer}: faster than kloss in {len(lost)} of {of} cells ({down} x {across}): {cells}"


def _skew(rows: Sequence[dict]) -> list[str]:
    lines = []
    for equal, zipf in zip(rows[::2], rows[1::2], strict=True):
        setting = f"{equal['adapters']} adapters, {equal['rows']} rows of each on average"
        lines.append(f"{setting:<46}{'Zipf / equal':>14}{'equal / kloss':>16}{'Zipf / kloss':>14}")
        for name, of_equal in zipf["of_equal"].items():
            both = [row["ratio"].get(name, 1.0) for row in (equal, zipf)]
            lines.append(f"  {name:<44}{of_equal:>14.2f}{both[0]:>16.2f}{both[1]:>14.2f}")
    return lines


def _memory(rows: Sequence[dict]) -> list[str]:
    lines = []
    for row in rows:
        setting = f"{row['direction']}, {row['adapters']} adapters, {row['rows']} rows of each"
        lines.append(f"{setting:<46}{'MiB':>10}{'/ kloss':>12}")
        lines += [
            f"  {name:<44}{size / 2**20:>10.1f}{size / max(1, row['bytes'][KLOSS]):>12.2f}" for name, size in row["bytes"].items()
        ]
    return lines


def plot(rows: Sequence[dict], file: Path) -> Path | None:
    """A map for each library and direction: colour and number are its ratio, bold where it is faster than kloss.

    Returns the file; None without such rows.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    tables = [name for name in ("training", "inference") if any(row["table"] == name for row in rows)]
    if not tables:
        return None
    across = max(len(peers([row for row in rows if row["table"] == name])) for name in tables)
    figure = Figure(figsize=(3.4 * across, 3.6 * len(tables)), layout="constrained")
    for name, line in zip(tables, figure.subplots(len(tables), across, squeeze=False), strict=True):
        own = [row for row in rows if row["table"] == name]
        for axes in line[len(peers(own)) :]:
            axes.set_axis_off()
        for axes, peer in zip(line, peers(own), strict=False):
            _map(axes, own, peer, TwoSlopeNorm(0, -4, 4))
            axes.set_title(f"{name}: {peer} / kloss", fontsize=9)
        line[0].set_ylabel("adapters")
    about = own[0]
    setting = f"{about['device']}, {about['dtype']}, width {about['width']}, r={about['rank']}"
    figure.suptitle(f"times as multiples of kloss's, of a linear: bold where kloss loses; {setting}", fontsize=9)
    figure.savefig(file, dpi=100)
    return file


def _map(axes: object, rows: Sequence[dict], peer: str, norm: Callable) -> None:
    adapters, counts = ([*dict.fromkeys(sorted(row[key] for row in rows))] for key in ("adapters", "rows"))
    cells = {(row["adapters"], row["rows"]): row["ratio"][peer] for row in rows if peer in row["ratio"]}
    values = torch.tensor([[cells.get((g, n), float("nan")) for n in counts] for g in adapters]).log2()
    axes.imshow(values.numpy(), cmap="PuOr", norm=norm, origin="lower", aspect="auto")
    for (g, n), ratio in cells.items():
        bold = "bold" if ratio < 1 else "normal"
        axes.text(counts.index(n), adapters.index(g), f"{ratio:.3g}", ha="center", va="center", fontsize=8, weight=bold)
    axes.set_xticks(range(len(counts)), list(map(str, counts)))
    axes.set_yticks(range(len(adapters)), list(map(str, adapters)))
    axes.set_xlabel("rows of each adapter")
