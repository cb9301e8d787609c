"""What the report says of each run, and the forms of it that are text: Markdown, CSV, JSON.

report_page.py makes the page from the same Parts, columns and sentences.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pipeline import analysis, statistics
from pipeline.analysis import Choice, Regression, Row, name, number, title
from pipeline.load_record import RUNGS, Level, Load
from pipeline.record import Run, Series
from pipeline.statistics import Percentile

SCHEMA = 1
HIDDEN_ERROR = 0.001  # below it a sentence says only that the error is
PUBLISHED = (  # soumith/convnet-benchmarks and its successors; seconds per batch of 32 on a GTX 1080
    ("AlexNet, with LRN", "0.026", "0.078"), ("AlexNet, without LRN", "0.007", "0.025"), ("VGG-16", "0.152", "0.617"),
    ("Inception V3", "0.145", ""), ("ResNet-152", "0.203", ""))
PUBLISHED_NOTE = ("Published figures of the classic convnet benchmark, for scale: a GTX 1080, batch 32, seconds per "
                  "batch. Not measured here, nor by this tool.")


@dataclass(frozen=True)
class Part:
    """One run of the report. `baseline`: the run it is compared with, if asked for. `load`: the newest load test of the
    same model, if there is one."""

    run: Run
    rows: tuple[Row, ...]
    choice: Choice
    warnings: tuple[str, ...]
    int8: str
    baseline: Run | None = None
    regressions: tuple[Regression, ...] = ()
    load: Load | None = None


# --- sentences -------------------------------------------------------------------------------------------------

def machine(run: Run) -> str:
    """The host, and what it computes with."""
    gpu = run.environment.gpu.get("name")
    return f"{run.environment.host}, {gpu if gpu and run.device != 'cpu' else run.environment.cpu}"


def label(run: Run) -> str:
    return f"{run.model} on {machine(run)}"


def summary(part: Part) -> str:
    """One sentence for whoever decides."""
    row = part.choice.row
    if row is None:
        return f"No engine of {part.run.model} can be recommended: {part.choice.reason}."
    batch = "" if row.series.batch == 1 else f" for a batch of {row.series.batch}"
    said = [f"{part.run.model} answers in {_two_digits(row.latency_ms)} ms{batch} with {title(row.series)}",
            _against_tensorflow(row), f"at a relative error {_error(row.series.relative_l2 or 0.0)}"]
    return ", ".join(text for text in said if text) + "."


def served(part: Part) -> str:
    """Of the load test: what a lone request takes beside the same engine in process, and where the rest goes."""
    assert part.load is not None
    lone = min(part.load.levels, key=lambda one: (one.clients, one.percentile_ms(50)))
    count = "a lone client" if lone.clients == 1 else f"each of {lone.clients} clients"
    rungs = ", ".join(f"{rung} {number(ms)}" for rung, ms in lone.rungs_ms.items())
    engine = in_process(part.load, part.run, part.rows)
    beside = "" if engine is None else f", the engine in process {number(engine.latency_ms)} ms ({name(engine.series)})"
    return (f"Served by Triton in {part.load.precision}, {count} gets an answer in {number(lone.percentile_ms(50))} ms "
            f"over {lone.transport}{beside}. Means in ms: {rungs}.")


def in_process(load: Load, run: Run, rows: Sequence[Row]) -> Row | None:
    """What the served requests compare with: the very engine in process, with the same batch."""
    same = {file for file, made in run.receipts.items()
            if isinstance(made, Mapping) and made.get("sha256") == load.engine_sha256}
    found = [r for r in rows if r.series.engine in same
             and r.series.batch == load.levels[0].batch and r.series.concurrency == 1 and r.series.mode == "forward"]
    return min(found, key=lambda r: r.latency_ms, default=None)


def _against_tensorflow(row: Row) -> str:
    if row.speedup is None:
        return ""
    return {"faster": f"{_two_digits(row.speedup.ratio)} times as fast as TensorFlow",
            "slower": f"at {_two_digits(row.speedup.ratio)} times the speed of TensorFlow",
            }.get(row.speedup.verdict, "not told apart from TensorFlow in speed")


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _error(value: float) -> str:
    return f"below {HIDDEN_ERROR * 100:g} %" if value < HIDDEN_ERROR else f"of {value * 100:.2g} %"


def against(part: Part, tolerance: float) -> str:
    """Of the comparison with an earlier run: what it found, and whether it was fair."""
    assert part.baseline is not None
    count = len(analysis.common(part.run, part.baseline))
    found = f"{len(part.regressions)} of {count}" if part.regressions else f"None of {count}"
    moved = "" if machine(part.run) == machine(part.baseline) else \
        f" That run is of another machine ({machine(part.baseline)})."
    return (f"{found} configurations slower by more than {tolerance:.0%} than in run {part.baseline.run_id} of "
            f"{part.baseline.environment.date}.{moved}")


# --- the table -------------------------------------------------------------------------------------------------

def _range(value: float, low: float, high: float, form: Callable[[float], str] = number) -> str:
    return f"{form(value)} ({form(low)}–{form(high)})"


def _percentile(row: Row, q: int) -> str:
    found: Percentile | None = row.summary.percentiles[q]
    return f"n/a (needs {statistics.samples_needed(q)} samples)" if found is None else number(found.value / 1e6)


def _speedup(row: Row) -> str:
    s = row.speedup
    return "–" if s is None else f"{_range(s.ratio, s.low, s.high, '{:.2f}'.format)} {s.verdict}"


def _median(row: Row) -> str:
    m = row.summary.median
    return _range(m.value / 1e6, m.low / 1e6, m.high / 1e6)


def _known(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("Configuration", lambda r: name(r.series)),
    ("Median, ms (99 % interval)", _median),
    ("Mean ± std, ms", lambda r: f"{number(r.summary.mean / 1e6)} ± {_two_digits(r.summary.std / 1e6)}"),
    ("Spread", lambda r: f"{r.summary.spread:.1%}"),
    ("p90, ms", lambda r: _percentile(r, 90)),
    ("p95, ms", lambda r: _percentile(r, 95)),
    ("p99, ms", lambda r: _percentile(r, 99)),
    ("Images / s", lambda r: "–" if r.images_per_second is None else number(r.images_per_second)),
    ("Times TensorFlow's speed (95 % interval)", _speedup),
    ("Relative error against Keras", lambda r: _known(r.series.relative_l2, "{:.1e}")),
    ("Share of the limit", lambda r: _known(r.of_limit, "{:.0%}")),
    ("Size, MB", lambda r: f"{r.series.size_bytes / 1e6:.1f}"),
    ("Build, s", lambda r: f"{r.series.build_seconds:.1f}"),
    ("Peak memory, MB", lambda r: f"{r.series.peak_bytes / 1e6:.0f}"),
)


SERVED_COLUMNS: tuple[tuple[str, Callable[[Level], str]], ...] = (
    ("Clients", lambda one: f"{one.clients}, {one.transport}"),
    ("Images / s", lambda one: number(one.images_per_second)),
    ("p50, ms", lambda one: number(one.percentile_ms(50))),
    ("p95, ms", lambda one: number(one.percentile_ms(95))),
    ("p99, ms", lambda one: number(one.percentile_ms(99))),
    ("Images in a batch", lambda one: f"{one.mean_batch:.1f}"),
    *((f"{rung.capitalize()}, ms", lambda one, rung=rung: number(one.rungs_ms[rung]))
      for rung in RUNGS),
    ("Errors", lambda one: str(sum(one.errors.values()))),
)


def facts(part: Part) -> dict[str, str]:
    """Where and how it was measured."""
    run, e = part.run, part.run.environment
    limits = [f"{x.precision} {x.flops_per_second / 1e9:.0f} GFLOP/s ({x.runtime})" for x in run.limits]
    if run.bandwidth_bytes_per_second:
        limits.append(f"memory {run.bandwidth_bytes_per_second / 1e9:.1f} GB/s")
    found = {
        "Measured": f"{e.date}, run {run.run_id}", "Model": f"{run.model}, sha256 {run.model_sha256}",
        "Host": e.host, "System": f"{e.system}, Python {e.python}", "Device": run.device,
        "CPU": f"{e.cpu}, {e.cores} cores, of them usable: {len(e.affinity)} logical",
        "Governor": e.governor or "unknown",
        "Frequency": "unknown" if e.frequency_mhz is None else f"{e.frequency_mhz:.0f} MHz",
        "Memory": f"{e.memory_bytes / 1e9:.1f} GB", "Load before": f"{e.load_before:.0%} of the cores",
        "GPU": ", ".join(f"{key} {value}" for key, value in e.gpu.items()),
        "Limits": "; ".join(limits),
        "Settings": f"{run.settings.steps} steps in {run.settings.rounds} rounds, burn-in "
                    f"{'auto' if run.settings.burn_in is None else run.settings.burn_in}, at least "
                    f"{run.settings.min_seconds:g} s, images {run.settings.images}, seed {run.settings.seed}",
        "Variables": ", ".join(f"{key}={value}" for key, value in e.variables.items()),
        "Versions": ", ".join(f"{key} {value}" for key, value in e.versions.items())}
    return {key: value for key, value in found.items() if value}


# --- JSON and CSV ----------------------------------------------------------------------------------------------

def document(parts: Sequence[Part]) -> dict[str, Any]:
    """JSON-ready."""
    return {"schema": SCHEMA, "runs": [{
        "run_id": p.run.run_id, "model": p.run.model, "machine": machine(p.run), "complete": p.run.complete,
        "summary": summary(p), "recommended": None if p.choice.row is None else p.choice.row.series.name,
        "reason": p.choice.reason, "warnings": list(p.warnings), "int8": p.int8,
        "baseline": None if p.baseline is None else p.baseline.run_id, "served": _served(p),
        "regressions": [{"configuration": r.series.name, "latency_ms": r.latency_ms, "baseline_ms": r.baseline_ms,
                         "ratio": r.ratio, "low": r.low, "high": r.high} for r in p.regressions],
        "configurations": [_flat(p, one) for one in p.run.series]} for p in parts]}


def _served(part: Part) -> dict[str, Any] | None:
    if part.load is None:
        return None
    return {"load_id": part.load.load_id, "precision": part.load.precision, "engine_sha256": part.load.engine_sha256,
            "summary": served(part), "levels": [
                {"transport": one.transport, "clients": one.clients, "batch": one.batch,
                 "images_per_second": one.images_per_second, "mean_batch": one.mean_batch,
                 **{f"p{share}_ms": _finite(one.percentile_ms(share)) for share in (50, 95, 99)},
                 "rungs_ms": {rung: _finite(ms) for rung, ms in one.rungs_ms.items()},
                 "errors": sum(one.errors.values())} for one in part.load.levels]}


def table_csv(parts: Sequence[Part]) -> str:
    """A row for each configuration; unknown numbers are empty."""
    found = [_flat(p, one) for p in parts for one in p.run.series]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]) if found else ["run_id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _flat(part: Part, one: Series) -> dict[str, Any]:
    row = next((r for r in part.rows if r.series is one), None)
    s, speedup = (None, None) if row is None else (row.summary, row.speedup)
    return {
        "run_id": part.run.run_id, "model": part.run.model, "host": part.run.environment.host,
        "device": part.run.device, "runtime": one.runtime, "precision": one.precision, "batch": one.batch,
        "threads": one.threads, "concurrency": one.concurrency, "mode": one.mode, "status": one.status,
        "reason": one.reason, "recommended": one is part.choice.series,
        "samples": sum(map(len, one.rounds_ns)), "rounds": len(one.rounds_ns), "burn_in_steps": len(one.burn_in_ns),
        "settled": one.settled,
        "latency_ms": s and s.median.value / 1e6, "latency_low_ms": s and s.median.low / 1e6,
        "latency_high_ms": s and s.median.high / 1e6, "mean_ms": s and s.mean / 1e6, "std_ms": s and s.std / 1e6,
        "spread": s and s.spread, **{f"p{q}_ms": s and (found := s.percentiles[q]) and found.value / 1e6
                                     for q in (90, 95, 99)},
        "images_per_second": row and row.images_per_second, "speedup": speedup and speedup.ratio,
        "speedup_low": speedup and speedup.low, "speedup_high": speedup and _finite(speedup.high),
        "verdict": speedup and speedup.verdict, "relative_l2": one.relative_l2, "top1": one.top1,
        "of_limit": row and row.of_limit, "size_bytes": one.size_bytes, "build_seconds": one.build_seconds,
        "peak_bytes": one.peak_bytes, "engine": one.engine}


def _finite(value: float) -> float | None:
    """JSON has no infinity: the end of an interval that a single sample gives."""
    return value if math.isfinite(value) else None


# --- Markdown --------------------------------------------------------------------------------------------------

def markdown(parts: Sequence[Part], tolerance: float, published: bool) -> str:
    lines = [f"# {_plain(heading(parts))}", ""]
    for part in parts:
        lines += [f"## {_plain(label(part.run))}", "", *_section(part, tolerance), ""]
    if published:
        rows = [("Network", "Forward", "Forward-backward"), *PUBLISHED]
        lines += ["## Published", "", PUBLISHED_NOTE, "", *_table(rows)]
    return "\n".join(lines).rstrip() + "\n"


def heading(parts: Sequence[Part]) -> str:
    return "Benchmark of " + ", ".join(dict.fromkeys(part.run.model for part in parts))


def _section(part: Part, tolerance: float) -> list[str]:
    lines = [f"**{_plain(summary(part))}**", "", f"Was int8 worth it? {_plain(part.int8)}", ""]
    if part.baseline is not None:
        lines += [_plain(against(part, tolerance)), "", *(f"- {_plain(str(r))}" for r in part.regressions), ""]
    if part.warnings:
        lines += ["Warnings:", "", *(f"- {_plain(text)}" for text in part.warnings), ""]
    table = [[heading for heading, _ in COLUMNS], *([cell(row) for _, cell in COLUMNS] for row in part.rows)]
    told = {**facts(part), "Command": part.run.command}
    lines += [*_table(table), ""]
    if part.load is not None:
        table = [[heading for heading, _ in SERVED_COLUMNS],
                 *([cell(one) for _, cell in SERVED_COLUMNS] for one in part.load.levels)]
        lines += [_plain(served(part)), "", *_table(table), ""]
    return [*lines, *(f"- {key}: {_plain(value)}" for key, value in told.items())]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *rest = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    return [first, "|---|" + "---:|" * (len(rows[0]) - 1), *rest]


def _plain(text: str) -> str:
    """Text of a run is never markup."""
    return re.sub(r"([\\`*\[\]|#])", r"\\\1", escape(" ".join(text.split()), quote=False))
