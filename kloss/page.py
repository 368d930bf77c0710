"""The report's HTML: tables, figures, numbers, and the style sheet. A cell or title given is HTML already."""

from __future__ import annotations

import math
from html import escape

CSS = """
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #1c1f24; --muted: #646b75; --rule: #dfe1e4;
  --soft: #f1f2f0; --bad: #b3261e; --link: #0072B2 }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --ink: #e6e8eb; --muted: #9aa2ad;
  --rule: #343941; --soft: #1d2026; --bad: #ff8a80; --link: #56B4E9 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 48px 28px 96px; background: var(--page); color: var(--ink);
  font: 15px/1.55 Inter, system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif }
.name { margin: 0 0 18px; color: var(--muted); letter-spacing: .02em }
h1 { margin: 0; max-width: 27em; font-size: 31px; line-height: 1.28; font-weight: 400;
  letter-spacing: -.012em; text-wrap: balance }
h1 b { font-weight: 680; white-space: nowrap }
h1 .ci { font-size: .62em; color: var(--muted); white-space: nowrap; letter-spacing: 0 }
.facts { margin: 18px 0 0; color: var(--muted) }
section, aside { margin-top: 56px }
h2 { margin: 0 0 4px; font-size: 21px; font-weight: 650; letter-spacing: -.01em }
h3 { margin: 30px 0 6px; font-size: 15px; font-weight: 650 }
.lead, .note { margin: 0 0 16px; max-width: 54em; color: var(--muted) }
.note { margin-top: 10px; font-size: 13.5px }
.scroll { overflow-x: auto }
.figures + .scroll { margin-top: 24px }
table { border-collapse: collapse; min-width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 0 7px 20px; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--rule) }
th { font-weight: 500; color: var(--muted); vertical-align: bottom; line-height: 1.3 }
th.over { border-bottom: 0; padding-bottom: 0; color: var(--ink) }
th:first-child, td:first-child, .two th:nth-child(2):not(.over), .two td:nth-child(2),
.settings th, .settings td { text-align: left }
th:first-child, td:first-child { padding-left: 0; white-space: nowrap }
.main td:first-child { font-weight: 600 }
.ci { color: var(--muted) }
td .ci, .bad { display: block; font-size: 11.5px; white-space: nowrap }
.bad { color: var(--bad) }
figcaption .bad { display: inline }
.none { color: var(--muted) }
aside { padding: 22px 26px 12px; border: 1px dashed var(--muted); border-radius: 8px }
aside h3 { margin-top: 0 }
.paper :is(th, td):is(:nth-child(2), :nth-child(3)) { background: var(--soft); padding-right: 14px }
.warning { margin: 16px 0 0; padding: 12px 16px 12px 34px; border-left: 3px solid var(--bad);
  background: var(--soft); font-size: 13.5px }
.figures { display: flex; flex-wrap: wrap; gap: 30px 3%; align-items: flex-start }
figure { margin: 0; width: 100% }
figure.half { width: 48.5% }
@media (max-width: 760px) { figure.half { width: 100% } }
figcaption { font-size: 13.5px; font-weight: 600; margin-bottom: 6px }
svg { display: block; width: 100%; height: auto; overflow: visible }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 18px; font-size: 13.5px }
.legend svg { display: inline-block; width: 26px; margin-right: 7px; vertical-align: middle }
.legend path { stroke-width: 2.4 }
i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 8px }
details { margin-top: 18px }
summary { cursor: pointer; color: var(--link) }
details[open] > summary { margin-bottom: 12px }
pre { padding: 14px 16px; border-radius: 6px; background: var(--soft); white-space: pre-wrap }
code, pre { font: 12.5px/1.5 ui-monospace, Menlo, "Liberation Mono", monospace; overflow-wrap: anywhere }
.choices { max-width: 48em; padding-left: 20px }
@media print { body { max-width: none; padding: 0 } }
"""


def document(title, header, body):
    """The whole page, without a script or a link to anything outside."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{CSS}</style></head><body><header>{header}</header><main>{body}</main></body></html>\n"
    )


def number(value, digits=3, sign=False):
    if value is None or math.isnan(value):
        return '<span class="none">–</span>'
    value = round(value, digits) + 0.0  # no -0
    return f"{value:{'+' if sign and value else ''}.{digits}f}".replace("-", "−")


def with_interval(row, name, sign=False):
    low, high = row[name + "_low"], row[name + "_high"]
    interval = "" if low is None else f'<span class="ci">{number(low)} to {number(high)}</span>'
    return number(row[name], sign=sign) + interval


def count(value):
    if value is None:
        return '<span class="none">–</span>'
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * unit:  # three digits would read 1e+03 of the next smaller one
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def table(head, rows, kind="", over=()):
    """`rows` of cells; the first column is text, the others numbers. `over`: (title, columns) above that."""
    head = "".join(f"<th>{cell}</th>" for cell in head)
    if over:
        head = "".join(f'<th class="over" colspan="{n}">{cell}</th>' for cell, n in over) + f"</tr><tr>{head}"
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title, lead, *body):
    return f"<section><h2>{title}</h2><p class='lead'>{lead}</p>{''.join(body)}</section>"


def figures(*figures):
    """`figures` of (caption, svg), side by side where they fit."""

    def one(caption, svg):
        width = "full" if 'class="full"' in svg else "half"
        return f'<figure class="{width}"><figcaption>{caption}</figcaption>{svg}</figure>'

    return '<div class="figures">' + "".join(one(*figure) for figure in figures) + "</div>"


def legend(entries):
    """`entries` of (name, colour, dash)."""
    return (
        '<p class="legend">'
        + "".join(
            f'<span><svg viewBox="0 0 26 8"><path d="M1 4H25" stroke="{colour}" stroke-dasharray="{dash}"/></svg>'
            f"{escape(name)}</span>"
            for name, colour, dash in entries
        )
        + "</p>"
    )


def details(title, body):
    return f"<details><summary>{title}</summary>{body}</details>"


def flat(value, prefix=""):
    """(dotted key, value) of a nested dict."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from flat(item, f"{prefix}{key}.")
        else:
            yield prefix + str(key), item
