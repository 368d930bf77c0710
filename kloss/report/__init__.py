"""report.html of a run folder: one file that opens offline."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..cl.effects import FEWEST_ORDERS
from ..cl.experiments import sections as experiments
from ..cl.metrics import is_sequential
from ..cl.shapes import ENVIRONMENT, check_scores, check_shape
from ..cl.summary import by_label, chosen_on_dev, comparisons, nothing_learned, summary_rows, warnings
from ..errors import UserError
from ..files import logs, opened, read_json, write_text
from . import curves, figures, paper, sections
from .downloads import Download, files_of
from .languages import languages
from .sections import Log


def write_report(run_folder: Path | str) -> Path:
    """Write report.html of a run folder and return its path.

    Reads scores.json and, if they are there, config.json, env.json and log.jsonl.
    Raises UserError for a folder without scores.json, an unreadable file or another format.
    """
    folder = Path(run_folder)
    scores = _read(folder / "scores.json", check_scores)
    config, env = folder / "config.json", folder / "env.json"
    page = render(
        scores,
        _read(config, lambda value: None) if config.exists() else {},
        _read(env, lambda value: check_shape(value, ENVIRONMENT)) if env.exists() else {},
        _read_logs(folder),
        *files_of(folder),
    )
    write_text(folder / "report.html", page.encode("utf-8", "replace").decode())  # JSON may hold half a surrogate pair
    return folder / "report.html"


def render(
    scores: Mapping[str, Any],
    config: Mapping[str, Any],
    env: Mapping[str, Any],
    log: Log,
    within: Sequence[Download] = (),
    beside: Sequence[str] = (),
) -> str:
    """The page.

    scores, config, env: contents of scores.json, config.json and env.json.
    log: phase -> its entries in log.jsonl.
    within: files that the page holds. beside: names of those that are too large for it.
    """
    strategies, rows = by_label(scores["runs"]), summary_rows(scores)
    sequential = {label: runs for label, runs in strategies.items() if is_sequential(runs[0]["R"])}
    compared, focus = comparisons(scores), next((row["label"] for row in sections.losing(rows)), None)
    section = languages(scores["corpus"], sequential, focus) if sequential else {}
    answers, learning, settings = list(experiments(scores)), curves.learning(strategies), curves.over_settings(strategies, rows)
    contents = [
        "Results",
        *(("Along the sequence", "Score matrices") if sequential else ()),
        *(("Within experiences",) if learning else ()),
        *(("Ranks and rates",) if settings else ()),
        *(answer.title for answer in answers),
        *(("Languages",) if section else ()),
        *(("Training",) if log else ()),
        "Choices and setting",
    ]
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return templates.get_template("page.html.j2").render(
        scores=scores,
        contents=contents,
        downloads=within,
        beside=beside,
        env=env,
        count=sections.count,
        counted=sections.counted,
        warnings=warnings(rows, scores.get("diverged_besides", ())),
        nothing_learned=nothing_learned(rows),
        could_forget=any(row["can_forget"] for row in rows),
        fewest_orders=FEWEST_ORDERS,
        headline=sections.headline(rows, compared),
        asked=sections.asked(scores, strategies),
        findings=[
            *(answer.findings[0] for answer in answers),
            *sections.findings(rows, section),
            *chosen_on_dev(scores, rows),
        ],  # fmt: skip
        limits=sections.limits(scores, rows, strategies[focus] if focus else []),
        compared=sections.paired_differences(compared),
        results=sections.results(rows, strategies),
        paper=paper.beside_the_paper(scores, rows),
        replicated=paper.findings(scores, strategies, rows),
        sequence=sections.along_the_sequence(strategies, sequential) if sequential else None,
        heat_maps=sections.heat_maps(sequential) if sequential else [],
        learning=learning,
        writing=figures.writing(scores["corpus"]["locales"]),
        settings=settings,
        languages=section or None,
        experiments=[(answer, sections.panels(answer)) for answer in answers],
        training=sections.training(log) if log else None,
        setting=sections.setting(scores.get("choices", []), config, env),
    )


def _read(path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Read a JSON object. Raises UserError, which says what to do, for one that is unreadable or not as `check` needs it."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        value = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; rename or delete it to go on") from error
    try:
        check(value)
    except UserError as error:
        raise UserError(f"{path} is not what kloss wrote ({error}); rename or delete it to go on") from error
    return value


def _read_logs(folder: Path) -> Log:
    """Phase -> its entries in the logs of the run's processes."""
    phases: dict[str, list[dict[str, Any]]] = {}
    for path in logs(folder):
        for entry in _read_log(path):
            phases.setdefault(str(entry.get("phase", "")), []).append(entry)
    return phases


def _read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log. A last line without its end, left by a killed run, is skipped."""
    try:
        with opened(path) as stream:
            lines = stream.read().decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}; rename or delete it to go on") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line, parse_int=_number, parse_float=_number, parse_constant=_number)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not JSON: {error}; delete the line to go on") from error
        if not isinstance(entry, dict):
            kind = type(entry).__name__
            raise UserError(f"{path}:{number} holds JSON of type {kind}, an object is needed; delete the line to go on")
        yield entry


def _number(text: str) -> float | None:
    """Return a number of the log; None for NaN, inf and what no chart can hold."""
    value = float(text)
    return value if abs(value) < 1e30 else None
