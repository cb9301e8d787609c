"""Report stage: benchmark runs as one page that opens anywhere, and as Markdown, CSV and JSON.

Read downward: the runs are read, what each says is worked out by analysis.py, and four files are written from that:
report_text.py has the sentences and the table, report_figures.py the plots, report_page.py the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.errors import CheckFailed, UsageError, WorkspaceError, listed
from pipeline import analysis, load_record, record, report_page, report_text
from pipeline.load_record import LOADS, Load
from pipeline.record import Run
from pipeline.report_text import Part
from pipeline.workspace import MANIFEST, NEW

BENCHMARKS = "benchmarks"  # of an artifact folder


@dataclass(frozen=True)
class Request:
    """What a user asks for. `runs`: files of runs, or artifact folders. `max_error`: relative L2 of the recommended
    engine (None: the limit of its precision). `published`: adds figures of other machines from the literature."""

    runs: tuple[Path, ...]
    out: Path | None = None
    baseline: Path | None = None
    tolerance: float = 0.05
    max_error: float | None = None
    max_latency_ms: float | None = None
    published: bool = False

    def __post_init__(self) -> None:
        for name in ("tolerance", "max_error", "max_latency_ms"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(name.replace("_", "-"), str(value), "a number of at least 0")
        if not self.runs:
            raise UsageError("runs", "none", "a run's file or an artifact folder")


@dataclass(frozen=True)
class Result:
    """`folder` holds index.html, report.md, report.csv and report.json."""

    folder: Path
    parts: tuple[Part, ...]

    @property
    def document(self) -> dict[str, Any]:
        """What report.json holds."""
        return report_text.document(self.parts)

    def check(self) -> None:
        """Raises CheckFailed that names the configuration which slowed down most."""
        found = sorted((r for part in self.parts for r in part.regressions), key=lambda r: -r.ratio)
        if found:
            raise CheckFailed(f"{len(found)} configuration{'s' * (len(found) > 1)} slower than the baseline",
                              str(found[0]), "", f"see {self.folder / 'index.html'}")


def report(request: Request) -> Result:
    """Writes the report. Raises UsageError for what is no run, and WorkspaceError for a folder not writable."""
    paths = [_file_of(path) for path in request.runs]
    parts = tuple(_part(request, record.read(path), path) for path in paths)
    if request.baseline is not None:
        parts = _compared(parts, record.read(_file_of(request.baseline)), request.tolerance)
    folder = request.out or _default_folder(paths)
    _write(folder, {
        "index.html": lambda: report_page.page(parts, request.tolerance, request.published),
        "report.md": lambda: report_text.markdown(parts, request.tolerance, request.published),
        "report.csv": lambda: report_text.table_csv(parts),
        "report.json": lambda: json.dumps(report_text.document(parts), indent=2, allow_nan=False) + "\n"})
    return Result(folder, parts)


def _part(request: Request, run: Run, path: Path) -> Part:
    return Part(run, analysis.rows(run), analysis.recommended(run, request.max_error, request.max_latency_ms),
                analysis.warnings(run), analysis.int8_worth(run), load=_load_of(run, path))


def _load_of(run: Run, path: Path) -> Load | None:
    """The newest load test of the artifact that the run lies in, if it was of the same model."""
    found = []
    for file in path.resolve().parent.parent.glob(f"{LOADS}/*.json"):
        with suppress(UsageError):  # as for runs
            load = load_record.read(file)
            if load.model_sha256 == run.model_sha256 and any(one.latency_ns for one in load.levels):
                found.append((load.environment.date, load.load_id, load))
    return max(found)[2] if found else None


def _compared(parts: tuple[Part, ...], baseline: Run, tolerance: float) -> tuple[Part, ...]:
    """Each run of the baseline's model and device with it. Raises UsageError where there is nothing to compare: no
    regression found would be no news then."""
    same = [p for p in parts if (p.run.model, p.run.device) == (baseline.model, baseline.device)
            and analysis.common(p.run, baseline)]
    if not same:
        wanted = listed(list(dict.fromkeys(f"{p.run.model} on {p.run.device}" for p in parts)))
        raise UsageError(f"baseline run {baseline.run_id}", f"{baseline.model} on {baseline.device}, with no "
                         "configuration in common", f"a run of {wanted} with one of its configurations")
    return tuple(replace(p, baseline=baseline, regressions=analysis.regressions(p.run, baseline, tolerance))
                 if p in same else p for p in parts)


def _file_of(path: Path) -> Path:
    """A run's file; of an artifact folder, that of its newest complete run. Raises UsageError if there is none."""
    if not path.is_dir():
        return path
    found = []
    for file in path.glob(f"{BENCHMARKS}/*.json"):
        with suppress(UsageError):  # of another version, or damaged: as good as not there
            found.append((record.read(file), file))
    complete = [(run.environment.date, run.run_id, file) for run, file in found if run.complete]
    if not complete:
        raise UsageError(f"runs of {path}", f"{len(found)} in {BENCHMARKS}, none complete", "one or more",
                         f"python -m pipeline.benchmark {path}")
    return max(complete)[2]


def _default_folder(paths: list[Path]) -> Path:
    """Beside the runs of an artifact; in the current folder for runs of several, or from elsewhere."""
    home, *others = {path.resolve().parent for path in paths}
    own = not others and home.name == BENCHMARKS and (home.parent / MANIFEST).exists()
    return (home.parent if own else Path()) / "report"


def _write(folder: Path, files: dict[str, Callable[[], str]]) -> None:
    """Each beside its name, then all renamed into place."""
    texts = {name: make() for name, make in files.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / (name + NEW)).write_text(text, "utf-8")
        for name in texts:
            (folder / (name + NEW)).replace(folder / name)
    except OSError as error:
        raise WorkspaceError(f"report folder {folder}", error.strerror or "not writable", "a folder that can be "
                             "written", "give another --out") from error


if __name__ == "__main__":
    from pipeline.cli import run_stage

    run_stage("report")
