"""The page that a run leaves behind: report.html, one file that opens offline, made from a run folder."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from kloss import page, sections
from kloss.aggregate import by_label, is_sequential, summary_rows
from kloss.errors import UserError
from kloss.files import read_json, write_text

__all__ = ["render", "summary_rows", "write_report"]


def write_report(run_folder) -> Path:
    """Writes report.html of a run folder from its scores.json, config.json, env.json and log.jsonl.

    The last three may be missing. Returns the path of the page.

    Raises UserError for a folder without scores.json, a file that cannot be read, or another format.
    """
    folder = Path(run_folder)
    scores = read_json(folder / "scores.json")
    if scores.get("format") != 1:
        given = scores.get("format")
        raise UserError(f"{folder / 'scores.json'} has format {given!r}; only format 1 is known")
    config, env = (read_json(p) if p.exists() else {} for p in (folder / "config.json", folder / "env.json"))
    log = folder / "log.jsonl"
    path = folder / "report.html"
    write_text(path, render(scores, config, env, _read_log(log) if log.exists() else {}))
    return path


def render(scores, config, env, phases):
    """The page as one string; what scores.json, config.json and env.json hold, and log.jsonl by phase."""
    shown, rows = by_label(scores["runs"]), summary_rows(scores)
    sequential = {label: runs for label, runs in shown.items() if is_sequential(runs)}
    measured = [row for row in rows if row["cbt"] is not None]
    body = [sections.results(rows, shown), sections.beside_the_paper(scores, rows)]
    if sequential:
        body += [sections.along_the_sequence(shown, sequential), sections.heat_maps(sequential)]
    if measured:
        focus = min(measured, key=lambda row: row["cbt"])["label"]
        body.append(sections.languages(scores["corpus"], sequential, focus))
    if phases:
        body.append(sections.training(phases))
    body.append(sections.setting(scores.get("choices", []), config, env))

    corpus, backbone = scores["corpus"], scores["backbone"]
    facts = [
        f"{sections.counted(len(corpus['locales']), 'language')} of {corpus['name']}",
        f"{corpus['labels']} labels",
        f"{backbone['name']}, {page.count(backbone['parameters'])} parameters, "
        f"{backbone['layers']} layers of {backbone['hidden']}",
        sections.counted(len(scores["runs"]), "run"),
    ]
    if env.get("commit"):
        facts.append(f"commit {env['commit'][:10]}{' (dirty)' if env.get('dirty') else ''}")
    header = (
        f"<p class='name'>kloss · {escape(scores['name'])}</p><h1>{_headline(rows, sequential)}</h1>"
        f"<p class='facts'>{' · '.join(map(escape, facts))}</p>"
    )
    return page.document(f"{scores['name']} · kloss", header, "".join(body))


def _read_log(path):
    """phase -> the entries of log.jsonl. A last line without its end was cut off by a kill: left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    phases = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise UserError(f"{path}:{number} holds JSON of type {type(entry).__name__}, an object is needed")
        phases.setdefault(str(entry.get("phase", "")), []).append(entry)
    return phases


def _lost(row):
    """NAME lost 0.31 F1 (0.28 to 0.34)"""
    sign = 1 if round(row["cbt"], 2) > 0 else -1
    interval = ""
    if row["cbt_low"] is not None:
        ends = sorted((sign * row["cbt_low"], sign * row["cbt_high"]))
        interval = " <span class='ci'>({} to {})</span>".format(*(page.number(end, 2) for end in ends))
    verb = "gained" if sign > 0 else "lost"
    return f"<b>{escape(row['label'])}</b> {verb} {abs(row['cbt']):.2f} F1{interval}"


def _headline(rows, sequential):
    """The finding: who lost most, and who least. sequential: the strategies that learn one language after another."""
    measured = sorted((row for row in rows if row["cbt"] is not None), key=lambda row: row["cbt"])
    if measured:
        text = f"{_lost(measured[0])} on the languages it had learned earlier"
        return text + (f"; {_lost(measured[-1])}." if len(measured) > 1 else ".")
    scored = [row for row in rows if row["f1"] is not None]
    if not scored:
        return "Every run diverged: there is nothing to compare." if rows else "No run is in this folder."
    best = max(scored, key=lambda row: row["f1"])
    if sequential:
        why = "What was lost is not known: no run that learned one language after another was measured to its end."
    else:
        why = "No two languages were learned one after the other, so none could be lost."
    return f"<b>{escape(best['label'])}</b> reached {best['f1']:.2f} F1. {why}"
