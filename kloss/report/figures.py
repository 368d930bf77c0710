"""The report's figures, as inline <svg> in the colours and the font of the page.

matplotlib draws text as text. Placeholder colours become CSS variables, so a figure fits light and dark pages.
All palettes are safe for colour-blind readers: Okabe & Ito (2008) for series, viridis for heat maps.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from ..cl.statistics import Floats
from ..cl.summary import mean, script, spaced

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
DASHES = ("", "6 2", "2 2", "8 2 2 2")
DOTTED = "1 2"
INK, MUTED, RULE = "#000001", "#000002", "#000003"  # placeholders: nothing else has these colours
FULL, HALF = 10.6, 5.1  # inches: width of one figure in a row, and of each of two

WRITING = (  # kind of writing, colour, scripts
    ("Latin", "#0072B2", "Latin"),
    ("other alphabets", "#56B4E9", "Cyrillic Greek Armenian Georgian Hangul"),
    ("consonant alphabets", "#009E73", "Arabic Hebrew"),
    ("syllable alphabets", "#E69F00", "Ethiopic Bengali Devanagari Kannada Malayalam Tamil Telugu Thai Khmer Myanmar"),
    ("Chinese and Japanese", "#D55E00", "Han Japanese"),
    ("unknown", "#8A8A8A", "unknown"),
)

Look = tuple[str, str]  # colour, dash


def look(n: int) -> Look:
    """Look of the n-th series: all colours solid, then all dashed."""
    return SERIES[n % len(SERIES)], DASHES[n // len(SERIES) % len(DASHES)]


def colour_of(locale: str) -> str:
    """Colour of the kind of writing."""
    return next((colour for _, colour, scripts in WRITING if script(locale) in scripts.split()), WRITING[-1][1])


def writing(locales: Iterable[str]) -> list[tuple[str, str]]:
    """(kind of writing, colour) of those that the locales have."""
    colours = {colour_of(locale) for locale in locales}
    return [(kind, colour) for kind, colour, _ in WRITING if colour in colours]


class Line(NamedTuple):
    """One series: y [n] at x [n], with a band low..high [n] if given."""

    look: Look
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None


class Panel(NamedTuple):
    """A figure with its caption. wide: it fills a row. warning: in red behind the caption."""

    caption: str
    svg: Markup
    wide: bool
    warning: str


def _figure(
    width: float, height: float, *, left: float = 0.62, right: float = 0.08, top: float = 0.08, bottom: float = 0.68
) -> "tuple[Figure, Axes]":
    """A figure with one axes; all in inches. A layout engine would take longer than the drawing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.set_axisbelow(True)
    return figure, axes


def _panel(caption: str, figure: "Figure", warning: str = "") -> Panel:
    """The figure as inline <svg>, without a fixed size and without ids that nothing refers to."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", transparent=True)
    start, body = buffer.getvalue().partition("<svg")[2].split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", body))
    body = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", body)
    body = re.sub(r'font: (?:\w+ )?([\d.]+)px [^;"]*', r"font-size: \1px", body)
    body = re.sub(r' font-family: [^;"]*;?', "", body)  # which form is there depends on matplotlib's version
    for placeholder, name in ((INK, "ink"), (MUTED, "muted"), (RULE, "rule")):
        body = body.replace(placeholder, f"var(--{name})")
    view = start.partition('viewBox="')[2].partition('"')[0]
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="{}" role="img" aria-label="{}">').format(view, caption)
    return Panel(caption, head + Markup(body), figure.get_figwidth() == FULL, warning)


def heat_map(
    caption: str, R: Floats, order: Sequence[str], largest: float, warning: str = "", *, rows: str = "after training on"
) -> Panel:
    """Score matrix of one strategy. NaN stays blank; a white line parts learned languages from others.

    Where there are values below 0, as of changes, red is below and blue above 0.

    R: [T+1, T], rows are steps, columns languages; or [T, T], rows are languages too, and there is no line.
    largest: top of the colour scale, common to all strategies.
    rows: what a row is.
    """
    T = len(order)
    small = T <= 14
    size = 8 if small else 7.5 if T <= 30 else 6.6
    height = 0.66 + (T + 1) * (0.27 if small else 0.135)
    change = bool((R < 0).any())  # NaN compares false
    figure, axes = _figure(HALF if small else FULL, height, left=0.78, right=0.65 if change else 0.55, top=0.6, bottom=0.06)
    low, colours = (-largest, "RdBu") if change else (0.0, "viridis")
    image = axes.imshow(R, cmap=colours, vmin=low, vmax=largest, aspect="auto", interpolation="none")
    axes.spines[:].set_visible(False)
    steps = len(R) > T
    if steps:
        stairs = np.repeat(np.arange(T + 1), 2)
        axes.plot(stairs[1:] - 0.5, stairs[:-1] + 0.5, color="white", linewidth=1.6)
    axes.xaxis.tick_top()
    axes.set_xticks(range(T), order, fontsize=size, rotation=0 if T <= 6 else 90)
    axes.set_yticks(range(len(R)), ["before", *order] if steps else order, fontsize=size)
    axes.set_ylabel(rows, color=MUTED, fontsize=8, labelpad=7)
    box, inch = axes.get_position(), 1 / figure.get_figwidth()
    bar = figure.colorbar(image, cax=figure.add_axes((box.x1 + 0.12 * inch, box.y0, 0.13 * inch, box.height)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=7, length=0)
    if T <= 12:
        for (i, j), f1 in np.ndenumerate(R):
            if not np.isnan(f1):
                dark = abs(f1) > 0.6 * largest if change else f1 < 0.6 * largest
                text = f"{f1 + 0.0:.2f}".replace("-0.00", "0.00").replace("0.", ".", 1).replace("-", "−")
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return _panel(caption, figure, warning)


def lines(caption: str, series: Iterable[Line], xlabel: str, ylabel: str, names: Sequence[str] = (), zero: bool = False) -> Panel:
    """Line chart over steps or hops.

    names: of the positions 1..n on the x axis; empty: numbers.
    zero: draw the line of no change.
    """
    bottom = 0.42 if len(names) <= 6 else 0.68
    figure, axes = _figure(FULL if len(names) > 16 else HALF, 2.5 + bottom, bottom=bottom)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    if zero:
        axes.axhline(0, color=MUTED, linewidth=0.8)
    for (colour, dash), x, y, low, high in series:
        style = (0, [float(length) for length in dash.split()]) if dash else "-"
        marker = "o" if np.count_nonzero(~np.isnan(y)) <= 14 else None
        if low is not None and high is not None:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, y, color=colour, linestyle=style, linewidth=1.8, marker=marker, markersize=3.5)
    if names:
        size, rotation = 7 if len(names) > 30 else 8, 0 if len(names) <= 6 else 90
        axes.set_xticks(range(1, len(names) + 1), names, fontsize=size, rotation=rotation)
    elif xlabel != "step":
        axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.015)
    axes.set_xlabel(xlabel, color=MUTED, fontsize=8)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=8, labelpad=7)
    return _panel(caption, figure)


def sequence(caption: str, series: Iterable[Line], borders: Sequence[float], names: Sequence[str], end: float) -> Panel:
    """F1 of one learner through its experiences, by step. NaN parts a line.

    borders, names: of each experience, the step where it begins and its language. end: the last step.
    """
    figure, axes = _figure(FULL, 2.6 if len(names) <= 14 else 2.9, top=0.3 if len(names) <= 14 else 0.6, bottom=0.42)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    for (colour, dash), x, y, _, _ in series:
        style = (0, [float(length) for length in dash.split()]) if dash else "-"
        axes.plot(x, y, color=colour, linestyle=style, linewidth=1.6)
    for border in borders:
        axes.axvline(border, color=RULE, linewidth=0.8)
    above = axes.secondary_xaxis("top")
    above.spines["top"].set_visible(False)
    size, rotation = (8, 0) if len(names) <= 14 else (7, 90)
    middles = [(first + last) / 2 for first, last in zip(borders, [*borders[1:], end], strict=True)]
    above.set_xticks(middles, names, fontsize=size, rotation=rotation, color=MUTED)
    above.tick_params(length=0, pad=1)
    axes.set_xlim(0, end)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=MUTED, fontsize=8)
    axes.set_ylabel("F1", color=MUTED, fontsize=8, labelpad=7)
    return _panel(caption, figure)


def bars(
    caption: str,
    values: Mapping[str, Sequence[float]],
    ylabel: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    warning: str = "",
) -> Panel:
    """Mean per locale as bars, range over runs or an interval as thin lines. * marks languages without spaces.

    values: locale -> one value per run. A locale that was not measured has no bar.
    intervals: locale -> (low, high), instead of the range of its values.
    """
    means = {locale: mean(runs) for locale, runs in values.items()}
    locales = sorted((locale for locale in means if not np.isnan(means[locale])), key=means.__getitem__)
    n = len(locales)
    figure, axes = _figure(FULL if n > 14 else HALF, 2.9, bottom=0.56)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.bar(range(n), [means[m] for m in locales], color=[colour_of(m) for m in locales], width=0.76)
    ends = intervals or {m: (float(np.nanmin(values[m])), float(np.nanmax(values[m]))) for m in locales}
    low, high = ([ends[m][end] for m in locales] for end in (0, 1))
    axes.vlines(range(n), low, high, color=INK, linewidth=0.9)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    ticks = [m if spaced(m) else f"{m} *" for m in locales]
    axes.set_xticks(range(n), ticks, fontsize=7 if n > 30 else 8, rotation=0 if n <= 6 else 90)
    axes.margins(x=0.01)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=8, labelpad=7)
    return _panel(caption, figure, warning)


def named_bars(caption: str, values: Mapping[str, Sequence[float]], xlabel: str) -> Panel:
    """A bar for each name, the mean of its values, each of which is a dot; from top to bottom."""
    n, longest = len(values), max(map(len, values))
    figure, axes = _figure(HALF, 0.62 + 0.27 * n, left=min(3, max(0.9, 0.15 + 0.075 * longest)), bottom=0.46)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.barh(range(n), [mean(runs) for runs in values.values()], color=look(0)[0], height=0.7, alpha=0.55)
    for i, runs in enumerate(values.values()):
        axes.plot(runs, np.full(len(runs), i), "o", color=INK, markersize=3)
    axes.set_yticks(range(n), list(values), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(xlabel, color=MUTED, fontsize=8)
    return _panel(caption, figure)


def scatter(
    caption: str, x: Floats, y: Floats, locales: Sequence[str], xlabel: str, ylabel: str, slope: float, alone: float
) -> Panel:
    """A dot for each observation, in the colour of its language's writing, and lines through the means of these slopes.

    slope: drawn solid. alone: dashed.
    """
    figure, axes = _figure(HALF, 2.9, bottom=0.46)
    axes.grid(color=RULE, linewidth=0.6)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.scatter(x, y, s=13, color=[colour_of(locale) for locale in locales], alpha=0.75, linewidths=0)
    ends = np.array([x.min(), x.max()])
    for steep, style in ((slope, "-"), (alone, (0, (4, 3)))):
        axes.plot(ends, y.mean() + steep * (ends - x.mean()), color=INK, linestyle=style, linewidth=1.2)
    axes.set_xlabel(xlabel, color=MUTED, fontsize=8)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=8, labelpad=7)
    return _panel(caption, figure)
