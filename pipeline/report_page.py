"""The report's page: one HTML file with everything inside of it, so that it opens with no network.

Its content security policy keeps it from asking for anything; all text of a run goes through `escape`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from pipeline import report_figures, report_text
from pipeline.analysis import Row, name, number
from pipeline.report_figures import Figure
from pipeline.report_text import COLUMNS, SERVED_COLUMNS, Part

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(parts: Sequence[Part], tolerance: float, published: bool) -> str:
    """HTML of the whole report."""
    from plotly.offline import get_plotlyjs

    figures = [list(report_figures.figures(p.run, p.rows, p.choice, p.load)) for p in parts]
    title = escape(report_text.heading(parts))
    first = [0, *(sum(map(len, figures[:i + 1])) for i in range(len(figures)))]  # number of each part's first figure
    body = "".join(_section(p, found, start, tolerance) for p, found, start in zip(parts, figures, first, strict=False))
    overview = _overview(parts) if len(parts) > 1 else ""
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{title}</title>\n<style>\n{_own('report.css')}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{title}</h1>\n{overview}{body}{_published() if published else ''}</main>\n"
            "<noscript><p>The figures need JavaScript; every number is in the tables.</p></noscript>\n"
            f"<script>{get_plotlyjs()}</script>\n"
            f"<script>\nconst FIGURES = {_script_json([f for found in figures for f in found])};\n"
            f"{_own('report.js')}</script>\n</body>\n</html>\n")


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")


def _script_json(figures: Sequence[Figure]) -> str:
    """No `<` inside of a script: none can end it."""
    return json.dumps([asdict(f) for f in figures], separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# --- sections --------------------------------------------------------------------------------------------------

def _section(part: Part, figures: Sequence[Figure], first: int, tolerance: float) -> str:
    plots = "".join(_figure(f, first + i) for i, f in enumerate(figures))
    return (f'<section>\n<h2>{escape(report_text.label(part.run))}</h2>\n'
            f'<p class="summary">{escape(report_text.summary(part))}</p>\n{_card(part.choice.row)}'
            f"{_regressions(part, tolerance)}{_warnings(part)}"
            f"<h3>Was int8 worth it?</h3>\n<p>{escape(part.int8)}</p>\n"
            f"<h3>Configurations</h3>\n{_configurations(part)}"
            f"{_served(part)}"
            f'<h3>Figures</h3>\n<div class="figures">\n{plots}</div>\n'
            f"<h3>Environment</h3>\n{_facts(part)}</section>\n")


def _figure(figure: Figure, index: int) -> str:
    """A place that report.js draws into."""
    return (f'<figure{" class=wide" if figure.wide else ""}>'
            f"<figcaption><b>{escape(figure.title)}</b>{escape(figure.caption)}</figcaption>"
            f'<div class="plot" id="figure-{index}" style="height:{figure.height_px}px"></div></figure>\n')


def _card(row: Row | None) -> str:
    if row is None:
        return ""
    one = row.series
    shown = [("Latency", f"{number(row.latency_ms)} ms")]
    shown += [("Images / s", number(row.images_per_second))] if row.images_per_second is not None else []
    shown += [("TensorFlow's speed", f"× {row.speedup.ratio:.2f}")] if row.speedup is not None else []
    shown += [("Relative error", f"{one.relative_l2:.1e}"), ("Size", f"{one.size_bytes / 1e6:.1f} MB")]
    numbers = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in shown)
    engine = f"<p><code>{escape(one.engine)}</code></p>" if one.engine else ""
    return (f'<div class="card"><h3>Recommended: {escape(name(one))}</h3><dl>{numbers}</dl>'
            f"{engine}</div>\n")


def _regressions(part: Part, tolerance: float) -> str:
    if part.baseline is None:
        return ""
    kind = "bad" if part.regressions else "good"
    return (f'<h3>Against the baseline</h3>\n<div class="note {kind}"><p>'
            f"{escape(report_text.against(part, tolerance))}</p>{_list(map(str, part.regressions))}</div>\n")


def _warnings(part: Part) -> str:
    if not part.warnings:
        return ""
    return f'<h3>Warnings</h3>\n<div class="note">{_list(part.warnings)}</div>\n'


def _list(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _facts(part: Part) -> str:
    shown = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in
                    report_text.facts(part).items())
    return f'<dl class="facts">{shown}</dl>\n<pre>{escape(part.run.command)}</pre>\n'


# --- tables ----------------------------------------------------------------------------------------------------

def _configurations(part: Part) -> str:
    marked = [i for i, row in enumerate(part.rows) if row.series is part.choice.series]
    cells = [[cell(row) for _, cell in COLUMNS] for row in part.rows]
    return _table([heading for heading, _ in COLUMNS], cells, marked)


def _served(part: Part) -> str:
    if part.load is None:
        return ""
    table = _table([heading for heading, _ in SERVED_COLUMNS],
                   [[cell(one) for _, cell in SERVED_COLUMNS] for one in part.load.levels])
    return (f"<h3>Served</h3>\n<p>{escape(report_text.served(part))}</p>\n{table}"
            f"<p>Load test {escape(part.load.load_id)}: <code>{escape(part.load.command)}</code></p>\n")


def _overview(parts: Sequence[Part]) -> str:
    """The runs side by side, by their recommended engines."""
    rows = []
    for p in parts:
        cells = [cell(p.choice.row) if p.choice.row else "–" for _, cell in COLUMNS]
        rows.append([report_text.label(p.run), *cells[:2], *cells[7:10]])
    headings = [heading for heading, _ in COLUMNS]
    return f"<h2>Runs</h2>\n{_table(['Run', 'Recommended', *headings[1:2], *headings[7:10]], rows)}"


def _published() -> str:
    table = _table(["Network", "Forward, s", "Forward-backward, s"], [list(row) for row in report_text.PUBLISHED])
    return f"<section>\n<h2>Published figures</h2>\n<p>{escape(report_text.PUBLISHED_NOTE)}</p>\n{table}</section>\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int] = ()) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headings)
    body = "".join(
        f'<tr{" class=best" if i in marked else ""}><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:]) + "</tr>\n" for i, row in enumerate(rows))
    return (f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n'
            "</table></div>\n")
