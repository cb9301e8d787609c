"""Run stage: everything, from a network's name to a report with a recommended engine.

Read downward: export, build every engine that this machine can run, verify, benchmark, report. Each stage takes what an
earlier start has left: an identical export, engines with the same receipt, a complete benchmark of the same engines.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from engines.errors import RuntimeUnavailable
from engines.runtime import BuildRequest, Profile, backend
from export.errors import UsageError
from pipeline import analysis, benchmark, build, record, report, verify
from pipeline import export as export_stage
from pipeline.analysis import Choice
from pipeline.export import SAVED_MODEL, ExportRequest, Progress
from pipeline.record import Run

# what a machine is asked for; what it cannot do is refused by the build, with the reason
ON_CPU = {"onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8"), "tensorflow": ("fp32",),
          "tensorflow-xla": ("fp32",)}
ON_GPU = {"onnxruntime": ("fp32", "tf32", "fp16"), "tensorrt": ("fp32", "tf32", "fp16", "bf16", "int8"),
          "tensorrt-rtx": ("fp32", "tf32", "fp16", "bf16", "int8"), "tensorflow": ("fp32", "tf32"),
          "tensorflow-xla": ("fp32",)}


@dataclass(frozen=True)
class Request:
    """What a user asks for. `runtimes`, `precisions`: empty for all that this machine can do."""

    model: str
    out: Path = Path("artifacts")
    runtimes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    device: str = "cpu"
    batches: tuple[int, ...] = (1,)
    steps: int = 100
    rounds: int = 5
    calibrate: str = "random"
    max_error: float | None = None
    max_latency_ms: float | None = None
    force: bool = False


@dataclass(frozen=True)
class Result:
    """`choice`: the recommended engine, or why there is none. `report`: the page."""

    folder: Path
    built: build.Result
    verified: verify.Result
    run: Run
    choice: Choice
    report: Path


def run(request: Request, progress: Progress = lambda step: None) -> Result:
    """Raises what the stages raise; VerifyFailed only after the report is written."""
    model = _exported(request, progress)
    built = _built(request, model, progress)
    verified = verify.verify(verify.Request(model, request.out, device=request.device), progress)
    path, measured = _benchmarked(request, model, built, progress)
    progress("report")
    page = report.report(report.Request((path,), max_error=request.max_error, max_latency_ms=request.max_latency_ms))
    choice = analysis.recommended(measured, request.max_error, request.max_latency_ms)
    return Result(built.folder, built, verified, measured, choice, page.folder / "index.html")


def _exported(request: Request, progress: Progress) -> str:
    """MODEL for the stages that follow; what Keras can build is exported with the TensorFlow baseline."""
    path = Path(request.model)
    if path.suffix == ".onnx" or (path.is_dir() and (path / "manifest.json").exists()):
        return request.model
    return str(export_stage.export(ExportRequest(request.model, request.out, saved_model=True), progress).folder)


def _built(request: Request, model: str, progress: Progress) -> build.Result:
    table = ON_CPU if request.device == "cpu" else ON_GPU
    rows: list[build.Row] = []
    folder = Path(model)
    largest = max(32, *request.batches)
    for runtime in request.runtimes or tuple(name for name in table if _available(name, request.device)):
        asked = build.Request(
            model, request.out, (runtime,), request.precisions or table.get(runtime, ("fp32",)), request.device,
            (Profile(1, min(8, largest), largest),), calibrate=request.calibrate, force=request.force)
        if runtime.startswith("tensorflow") and not (folder / SAVED_MODEL).is_dir():
            continue  # an ONNX file from elsewhere has no baseline
        made = build.build(asked, progress)
        rows += made.rows
        folder = made.folder
    return build.Result(folder, tuple(rows))


def _available(runtime: str, device: str) -> bool:
    with contextlib.suppress(RuntimeUnavailable):
        backend(runtime).identity(BuildRequest(Path(), runtime, device=device))
        return True
    return False


def _benchmarked(request: Request, model: str, built: build.Result, progress: Progress) -> tuple[Path, Run]:
    """The newest complete run of the same engines and settings, or a new one."""
    engines = {row.receipt.file for row in built.rows if row.receipt is not None}
    for path in sorted((built.folder / benchmark.BENCHMARKS).glob("*.json"), reverse=True) if not request.force else ():
        with contextlib.suppress(UsageError):
            found = record.read(path)
            asked = (request.steps, request.rounds, set(request.batches), request.device)
            if found.complete and asked == (found.settings.steps, found.settings.rounds,
                                            {s.batch for s in found.series}, found.device) \
                    and engines == {s.engine for s in found.series}:
                return path, found
    made = benchmark.benchmark(benchmark.Request(
        model, request.out, request.runtimes, request.precisions, request.batches, request.steps,
        rounds=request.rounds, device=request.device), progress)
    return made.path, made.run


if __name__ == "__main__":
    from pipeline.cli import run_stage

    run_stage("run")
