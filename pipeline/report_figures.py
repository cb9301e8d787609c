"""The report's figures: plain data for plotly.js, one colour for each runtime and one form for each precision.

Text from a run is escaped, since plotly reads a little HTML in names and labels. Colours of text and grid are not here:
the page sets them, for light and for dark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor, log10
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline import report_text
from pipeline.analysis import Choice, Row, title
from pipeline.load_record import RUNGS, Load
from pipeline.record import Run, Series

# told apart by the colour-blind, and on white as on black: Okabe and Ito 2008, and two more of Tol 2021
COLOURS = MappingProxyType({
    "tensorflow": "#e69f00", "tensorflow-xla": "#d55e00", "onnxruntime": "#0072b2", "openvino": "#009e73",
    "tensorrt": "#cc79a7", "tensorrt-rtx": "#8f63c9", "onnxruntime-tensorrt": "#56b4e9",
    "onnxruntime-tensorrt-rtx": "#999933"})
OTHER = "#808080"
FORMS = MappingProxyType({"fp32": ("circle", "solid"), "tf32": ("circle-open", "longdash"), "fp16": ("square", "dash"),
                          "bf16": ("square-open", "dashdot"), "fp8": ("diamond-open", "longdashdot"),
                          "int8": ("diamond", "dot")})
STEPS = (("host_to_device", "host to device", "#9aa5b1"), ("compute", "compute", "#3d7ea6"),
         ("device_to_host", "device to host", "#6c7a89"), ("", "call overhead", "#c9a227"))
RUNG_COLOURS = ("#c9a227", "#9aa5b1", "#3d7ea6", "#6c7a89", "#b07aa1")
LADDER = MappingProxyType({  # layout of bars whose parts add up to a time
    "barmode": "stack", "legend": {"traceorder": "normal"}, "xaxis": {"title": {"text": "ms"}},
    "yaxis": {"autorange": "reversed", "automargin": True}})
POINTS = 500  # of a distribution that are drawn, evenly taken; a box is always of all
SMALLEST_ERROR = 1e-8  # drawn for an error of zero, which a logarithm has no place for


@dataclass(frozen=True)
class Figure:
    """`caption`: how to read it. `data` and `layout`: as plotly.js takes them. `height_px` at any width.
    `wide`: takes the width of the page, not half of it."""

    title: str
    caption: str
    height_px: int
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = False


def figures(run: Run, rows: Sequence[Row], choice: Choice, load: Load | None = None) -> Iterator[Figure]:
    """Those that the run, and the load test of what was deployed, have numbers for."""
    alone = [r for r in rows if r.series.concurrency == 1]
    yield from _front(alone, choice)
    for where, found in _facets(rows, lambda r: (r.series.mode, r.series.batch, r.series.concurrency)):
        yield _distribution(where, found)
        yield from _burn_in(where, [r.series for r in found])
        yield from _ladder(where, found)
    yield from _batches(alone)
    for where, found in _facets(rows, lambda r: (r.series.mode, r.series.batch)):
        yield from _concurrency(where, found)
    if load is not None:
        yield from _served(load, run, rows)


def _facets(rows: Sequence[Row], key: Callable[[Row], tuple[str | int, ...]]) -> Iterator[tuple[str, list[Row]]]:
    """(what they have in common, the rows) for each value of `key`: mode, batch, perhaps concurrency."""
    for (mode, batch, *count), found in groupby(sorted(rows, key=key), key):
        processes = f", {count[0]} processes" if count and count[0] != 1 else ""
        yield f"{'' if mode == 'forward' else f'{mode}, '}batch {batch}{processes}", list(found)


def label(one: Series) -> str:
    """What sets a configuration apart within its figure, escaped."""
    return escape(title(one) + (f", {one.threads} threads" if one.threads else ""))


# --- figures ---------------------------------------------------------------------------------------------------

def _distribution(where: str, rows: Sequence[Row]) -> Figure:
    data = [{"type": "box", "name": label(r.series), "x": _ms(_flat(r.series)), "orientation": "h", "boxpoints": False,
             "line": {"width": 1.5}, "marker": {"color": _colour(r.series)}, "offsetgroup": "box", "hoverinfo": "x"}
            for r in rows]
    data += [{"type": "box", "name": label(r.series), "x": _ms(_thinned(_flat(r.series))), "orientation": "h",
              "boxpoints": "all", "jitter": 0.7, "pointpos": 0, "fillcolor": "transparent", "line": {"width": 0},
              "marker": {"color": _colour(r.series), "size": 3, "opacity": 0.45}, "offsetgroup": "strip",
              "hoverinfo": "skip"} for r in rows]
    layout = {"showlegend": False, "boxmode": "group", "boxgroupgap": 0.1, "boxgap": 0.25,
              "xaxis": {"title": {"text": "ms"}}, "yaxis": {"autorange": "reversed", "automargin": True}}
    return Figure(f"Samples, {where}", "Every sample below its box: median, quartiles, and the smallest and "
                  "largest.", 90 + 56 * len(rows), data, layout)


def _burn_in(where: str, found: Sequence[Series]) -> Iterator[Figure]:
    drawn = [one for one in found if one.burn_in_ns]
    if not drawn:
        return
    data, values = [], [1.0]
    for one in drawn:
        measured = _flat(one)
        curve = np.array((*one.burn_in_ns, *measured[:max(50, 5 * len(one.burn_in_ns))])) / np.median(measured)
        values += curve.tolist()
        data.append({**_line(one), "x": list(range(-len(one.burn_in_ns), len(curve) - len(one.burn_in_ns))),
                     "y": _rounded(curve), "mode": "lines"})
    layout = {"xaxis": {"title": {"text": "step; those before 0 are burn-in"}, "zeroline": True, "zerolinewidth": 2},
              "yaxis": {"title": {"text": "time / final median"}, **_log(values)}}
    yield Figure(f"Burn-in, {where}", "Time of a step relative to the median of all that were measured. A curve that "
                 "is level from step 0 on had settled.", 340 + 14 * len(drawn), data, layout)


def _batches(rows: Sequence[Row]) -> Iterator[Figure]:
    sizes = sorted({r.series.batch for r in rows})
    if len(sizes) < 2:
        return
    data = [{**_line(found[0].series, found[0].series.mode), "x": [r.series.batch for r in found],
             "y": _rounded([r.latency_ms for r in found]), "error_y": _interval(found), "mode": "lines+markers"}
            for found in _curves(rows, lambda one: one.batch, lambda one: one.mode)]
    layout = {"xaxis": {"title": {"text": "batch size"}, "type": "log", "tickvals": sizes},
              "yaxis": {"title": {"text": "ms"}, **_log([r.latency_ms for r in rows])}}
    yield Figure("Latency and batch size", "Median time of a step with its 99 % interval.", 340 + 14 * len(data), data,
                 layout)


def _concurrency(where: str, rows: Sequence[Row]) -> Iterator[Figure]:
    rows = [r for r in rows if r.images_per_second is not None]
    counts = sorted({r.series.concurrency for r in rows})
    if len(counts) < 2:
        return
    data = [{**_line(found[0].series), "x": [r.series.concurrency for r in found], "mode": "lines+markers",
             "y": _rounded([r.images_per_second for r in found if r.images_per_second])}
            for found in _curves(rows, lambda one: one.concurrency, lambda one: one.batch)]
    layout = {"xaxis": {"title": {"text": "concurrent processes"}, "tickvals": counts},
              "yaxis": {"title": {"text": "images / s"}, "rangemode": "tozero"}}
    yield Figure(f"Throughput and concurrency, {where}", "All processes together.", 340 + 14 * len(data), data, layout)


def _front(rows: Sequence[Row], choice: Choice) -> Iterator[Figure]:
    known = sorted((r for r in rows if r.series.relative_l2 is not None and r.series.mode == "forward"),
                   key=lambda r: r.latency_ms)
    batch = choice.series.batch if choice.series else min((r.series.batch for r in known), default=0)
    known = [r for r in known if r.series.batch == batch]
    if not known:
        return
    errors = [max(r.series.relative_l2 or 0.0, SMALLEST_ERROR) for r in known]
    best = [i for i in range(len(known)) if errors[i] < min(errors[:i], default=np.inf)]
    data = [{"x": [known[i].latency_ms for i in best], "y": [errors[i] for i in best], "mode": "lines",
             "line": {"color": OTHER, "dash": "dot", "width": 1.5}, "showlegend": False, "hoverinfo": "skip"}]
    places = _places([r.latency_ms for r in known], errors)
    data += [_point(r, error, place, r.series is choice.series)
             for r, error, place in zip(known, errors, places, strict=True)]
    layout = {"showlegend": False, "xaxis": {"title": {"text": "median, ms"}, **_log([r.latency_ms for r in known])},
              "yaxis": {"title": {"text": "relative L2 error"}, **_log(errors)}}
    caption = "Lower left is better. The dotted line joins engines that no other beats in both; the recommended one " \
              "has a ring." + (f" An error of 0 is drawn at {SMALLEST_ERROR:g}." if SMALLEST_ERROR in errors else "")
    yield Figure(f"Accuracy and latency, batch {batch}", caption, 420, data, layout, wide=True)


def _places(xs: Sequence[float], ys: Sequence[float]) -> list[str]:
    """Of each label, by which few cover each other or a point: positions in plotly's words, on a page of full width.

    A label takes about an eighth of the width and a fifteenth of the height.
    """
    spots = {"middle right": (0.07, 0.0), "middle left": (-0.07, 0.0), "top center": (0.0, 0.07),
             "bottom center": (0.0, -0.07)}
    points = [(log10(x / min(xs)) / (log10(max(xs) / min(xs)) or 1) * 0.8,
               log10(y / min(ys)) / (log10(max(ys) / min(ys)) or 1) * 0.8) for x, y in zip(xs, ys, strict=True)]
    taken, places = list(points), []
    for x, y in points:
        covered = {place: sum(abs(x + dx - a) < 0.13 and abs(y + dy - b) < 0.06 for a, b in taken
                              if (a, b) != (x, y)) for place, (dx, dy) in spots.items()}
        best = min(spots, key=lambda place: covered[place])
        taken.append((x + spots[best][0], y + spots[best][1]))
        places.append(best)
    return places


def _point(row: Row, error: float, place: str, ringed: bool) -> dict[str, Any]:
    marker = {"color": _colour(row.series), "symbol": _form(row.series)[0], "size": 11,
              "line": {"width": 0, "color": _colour(row.series)}}
    if ringed:
        marker |= {"size": 17, "line": {"width": 3, "color": "#888888"}}
    text = f"<b>{label(row.series)}</b>" if ringed else label(row.series)
    return {"x": [row.latency_ms], "y": [error], "mode": "markers+text", "text": [text], "textposition": place,
            "cliponaxis": False, "name": label(row.series), "marker": marker}


def _ladder(where: str, rows: Sequence[Row]) -> Iterator[Figure]:
    """Only of engines whose time on a GPU is known."""
    drawn = [r for r in rows if r.series.device_ns]
    if not drawn:
        return
    parts = [_stages(r) for r in drawn]
    data = [{"type": "bar", "orientation": "h", "name": name, "y": [label(r.series) for r in drawn],
             "x": _rounded([part[i] for part in parts]), "marker": {"color": colour}}
            for i, (_, name, colour) in enumerate(STEPS)]
    yield Figure(f"Where the time goes, {where}", "Medians by CUDA events; call overhead is what is left of the whole "
                 "call.", 140 + 40 * len(drawn), data, {**LADDER})


def _served(load: Load, run: Run, rows: Sequence[Row]) -> Iterator[Figure]:
    """The ladder of a request to the server, for each transport, below the same engine in process."""
    engine = report_text.in_process(load, run, rows)
    for transport, found in groupby(sorted(load.levels, key=lambda one: (one.transport, one.clients)),
                                    lambda one: one.transport):
        levels = [one for one in found if one.latency_ns]
        names = [f"{one.clients} client{'s' if one.clients > 1 else ''}" for one in levels]
        data = [{"type": "bar", "orientation": "h", "name": rung, "y": names, "marker": {"color": colour},
                 "x": _rounded([one.rungs_ms[rung] for one in levels])}
                for rung, colour in zip(RUNGS, RUNG_COLOURS, strict=True)]
        if engine is not None:
            data.insert(0, {"type": "bar", "orientation": "h", "name": "in process", "y": ["in process"],
                            "x": _rounded([engine.latency_ms]), "marker": {"color": _colour(engine.series)}})
        yield Figure(f"A request to the server, {escape(transport)}", "Means by the server's statistics; the way there "
                     "and back is what they leave of the client's time. In process: the median of the same engine "
                     "without a server.", 200 + 34 * (len(names) + 1), data, {**LADDER})


def _stages(row: Row) -> list[float]:
    """Medians in ms, in the order of STEPS."""
    known = [float(np.median(found or [0])) / 1e6 for found in (
        [n for one in row.series.device_ns.get(key, ()) for n in one] for key, _, _ in STEPS[:-1])]
    return [*known, max(0.0, row.latency_ms - sum(known))]


# --- parts -----------------------------------------------------------------------------------------------------

def _flat(one: Series) -> list[int]:
    return [n for found in one.rounds_ns for n in found]


def _thinned(samples: Sequence[int]) -> Sequence[int]:
    return samples[::ceil(len(samples) / POINTS)]


def _ms(samples: Sequence[int]) -> list[float]:
    return _rounded([n / 1e6 for n in samples])


def _rounded(values: Iterable[float]) -> list[float]:
    """Five digits: what a figure can show, in half the bytes."""
    return [float(f"{value:.5g}") for value in values]


def _colour(one: Series) -> str:
    return COLOURS.get(one.runtime, OTHER)


def _form(one: Series) -> tuple[str, str]:
    return FORMS.get(one.precision, ("cross", "solid"))


def _line(one: Series, mode: str = "forward") -> dict[str, Any]:
    symbol, dash = _form(one)
    return {"name": label(one) + ("" if mode == "forward" else f", {mode}"),
            "line": {"color": _colour(one), "dash": dash, "width": 2},
            "marker": {"color": _colour(one), "symbol": symbol, "size": 8}}


def _curves(rows: Sequence[Row], along: Any, beside: Any) -> Iterator[list[Row]]:
    """The rows of each curve, by `along`."""
    curves: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda r: along(r.series)):
        one = row.series
        curves.setdefault((one.runtime, one.precision, one.threads, beside(one)), []).append(row)
    yield from curves.values()


def _interval(rows: Sequence[Row]) -> dict[str, Any]:
    medians = [r.summary.median for r in rows]
    return {"type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
            "array": _rounded([(m.high - m.value) / 1e6 for m in medians]),
            "arrayminus": _rounded([(m.value - m.low) / 1e6 for m in medians])}


def _log(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis from one round number to another, with its ticks at 1, 2, 5; over three decades, at 1."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)) + 1e-9)
    ticks = [float(f"{m}e{n}") for n in range(low, high + 1) for m in (1, 2, 5)]
    if max(values) > 1000 * min(values):
        ticks = ticks[::3]
    first, last = max(t for t in ticks if t <= min(values)), min(t for t in ticks if t > max(values))
    shown = [t for t in ticks if first <= t <= last]
    return {"type": "log", "tickvals": shown, "ticktext": [f"{t:g}" for t in shown],
            "range": [log10(first) - 0.05, log10(last) + 0.05]}
