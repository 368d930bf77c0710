"""Figures of the report: each function returns one inline <svg> whose text and rules have the page's colours.

matplotlib draws; its text stays text (the page's font, selectable), and stand-in colours become CSS
variables, so one figure serves light and dark. Series colours are those of Okabe & Ito (2008), safe for
colour-blind readers; heat maps use viridis, safe as well.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import NamedTuple

import numpy as np

SERIES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
DASHES = ("", "6 2", "2 2", "8 2 2 2")
INK, MUTED, RULE = "#000001", "#000002", "#000003"  # stand-ins: nothing else is drawn in them
FULL, HALF = 10.6, 5.1  # widths in inches of a figure alone and of two in a row


class Line(NamedTuple):
    """One series: `values` [n] at `x` [n], a band `low`..`high` [n] (None: no band), and its look."""

    x: np.ndarray
    values: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    colour: str
    dash: str = ""


def look(n):
    """(colour, dash) of the n-th series: colours first, then the same colours dashed."""
    return SERIES[n % len(SERIES)], DASHES[n // len(SERIES) % len(DASHES)]


def _figure(width, height, *, left=0.62, right=0.08, top=0.08, bottom=0.68):
    """A figure with one axes; all in inches (a layout engine would take longer than the drawing)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    inside = (width - left - right) / width, (height - top - bottom) / height
    axes = figure.add_axes((left / width, bottom / height, *inside))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure, alt):
    """The figure as an <svg> to be put inline: no ids but those it refers to, no fixed size."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r'font: (?:\w+ )?([\d.]+)px [^;"]*', r"font-size: \1px", text)
    for stand_in, name in ((INK, "ink"), (MUTED, "muted"), (RULE, "rule")):
        text = text.replace(stand_in, f"var(--{name})")
    width = "full" if figure.get_figwidth() == FULL else "half"
    box = re.search(r'viewBox="[^"]*"', text)[0]
    label = f'role="img" aria-label="{escape(alt)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="{width}" {box} {label}>'
    return head + text[text.index(">") + 1 :]


def _locale_ticks(axis, names, size):
    axis.set_ticks(range(len(names)), names, fontsize=size)


def heat_map(R, order, *, largest, alt):
    """R [T+1, T] of one strategy: rows are steps, columns languages, in order of training; NaN stays blank.

    `largest` is the top of the colour scale, common to all strategies. The line parts languages seen from
    others.
    """
    R = np.asarray(R, dtype=np.float64)
    T = R.shape[1]
    small = T <= 14
    size = 8 if small else 7.5 if T <= 30 else 6.6
    height = 0.66 + (T + 1) * (0.27 if small else 0.135)
    figure, axes = _figure(HALF if small else FULL, height, left=0.78, right=0.55, top=0.6, bottom=0.06)
    image = axes.imshow(R, cmap="viridis", vmin=0, vmax=largest, aspect="auto", interpolation="none")
    axes.spines[:].set_visible(False)
    axes.plot(
        [-0.5, *np.repeat(np.arange(T), 2) + np.tile([0.5, 0.5], T)],
        [0.5, *np.ravel([(i + 0.5, i + 1.5) for i in range(T)])],
        color="white",
        linewidth=1.6,
    )
    axes.xaxis.tick_top()
    _locale_ticks(axes.xaxis, order, size)
    axes.tick_params(axis="x", rotation=0 if T <= 6 else 90)
    _locale_ticks(axes.yaxis, ["before", *order], size)
    axes.set_ylabel("after training on", color=MUTED, fontsize=8)
    place = axes.get_position()
    beside = (place.x1 + 0.12 / figure.get_figwidth(), place.y0, 0.13 / figure.get_figwidth(), place.height)
    bar = figure.colorbar(image, cax=figure.add_axes(beside))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=7, length=0)
    if T <= 12:
        for (i, j), value in np.ndenumerate(R):
            if not np.isnan(value):
                axes.text(
                    j,
                    i,
                    f"{value:.2f}".lstrip("0"),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < 0.6 * largest else "black",
                )
    return _svg(figure, alt)


def lines(series, *, xlabel, ylabel, alt, names=None, zero=False, wide=False):
    """`series` of Lines over steps or hops; `names` of positions 1..n; `zero` draws the line of no change."""
    bottom = 0.42 if names is None or len(names) <= 6 else 0.68
    figure, axes = _figure(FULL if wide else HALF, 2.5 + bottom, bottom=bottom)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    if zero:
        axes.axhline(0, color=MUTED, linewidth=0.8)
    for line in series:
        style = (0, [float(d) for d in line.dash.split()]) if line.dash else "-"
        marker = "o" if np.count_nonzero(~np.isnan(line.values)) <= 14 else None
        if line.low is not None:
            axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.18, linewidth=0)
        axes.plot(line.x, line.values, color=line.colour, linestyle=style, linewidth=1.8, marker=marker, markersize=3.5)
    if names is not None:
        axes.set_xticks(
            range(1, len(names) + 1), names, fontsize=7 if len(names) > 30 else 8, rotation=0 if len(names) <= 6 else 90
        )
    elif xlabel != "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.015)
    axes.set_xlabel(xlabel, color=MUTED, fontsize=8)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=8)
    return _svg(figure, alt)


def bars(names, values, low, high, colours, *, ylabel, alt):
    """One bar a language, in the order given, with the range over runs as a thin line (`low`, `high` [n])."""
    figure, axes = _figure(FULL if len(names) > 14 else HALF, 2.9, bottom=0.56)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.bar(range(len(names)), values, color=colours, width=0.76)
    axes.vlines(range(len(names)), low, high, color=INK, linewidth=0.9)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    _locale_ticks(axes.xaxis, names, 7 if len(names) > 30 else 8)
    axes.tick_params(axis="x", rotation=0 if len(names) <= 6 else 90)
    axes.margins(x=0.01)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=8)
    return _svg(figure, alt)
