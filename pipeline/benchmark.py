"""Benchmark stage: the forward latency of every engine, side by side, every sample kept.

Read downward: for each batch size and concurrency, every engine gets fresh processes, which load it, prove it against
the reference, and run until their latency has settled. Then the engines take turns, round after round, so that a drift
of the machine hits all alike. The run's file is written anew after every round: what was measured is kept, whatever
ends the stage, and the same command goes on where it ended.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from time import monotonic, perf_counter_ns
from typing import Any

import numpy as np

from engines import receipt as receipts
from engines.errors import EngineError
from engines.receipt import Receipt
from engines.runtime import BuildRequest, backend
from engines.worker import FORWARD, Timings, Worker
from export.errors import UsageError
from pipeline import artifact, environment, limits, record, verify, workspace
from pipeline import statistics as stats
from pipeline.export import MODEL, REFERENCE, SAVED_MODEL, Progress
from pipeline.record import Run, Series, Settings
from pipeline.workspace import ENGINES, Workspace

BENCHMARKS = "benchmarks"
BURN_IN_LEAST, BURN_IN_ASK, BURN_IN_MOST = 10, 20, 200  # steps: a few looks at a long window, not many at a short one
BURN_IN_SECONDS = 20.0  # auto stops there, settled or not
REWARM = 2  # steps at the start of each round
BYTES = {"fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}  # of a weight; the others have four


@dataclass(frozen=True)
class Request:
    """What a user asks for. `burn_in` None: until the latency has settled. `steps`: samples of each configuration in
    all rounds; `min_seconds` may ask for more. `threads` 0: the engine's own. `images`: `random` or a folder."""

    model: str
    out: Path = Path("artifacts")
    runtimes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    steps: int = 100
    burn_in: int | None = None
    min_seconds: float = 0.0
    rounds: int = 5
    mode: str = FORWARD
    threads: tuple[int, ...] = (0,)
    concurrency: tuple[int, ...] = (1,)
    images: str = "random"
    device: str = "cpu"
    seed: int = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        wrong = [name for name, values, least in (
            ("batch", self.batches, 1), ("steps", (self.steps,), 1), ("rounds", (self.rounds,), 1),
            ("threads", self.threads, 0), ("concurrency", self.concurrency, 1), ("burn-in", (self.burn_in or 0,), 0),
        ) if not values or min(values) < least]
        if wrong:
            raise UsageError(wrong[0], "too small", "a number of at least 1")
        if self.mode not in record.MODES:
            raise UsageError(f"mode {self.mode!r}", "unknown", f"one of {', '.join(record.MODES)}")


@dataclass(frozen=True)
class Result:
    folder: Path
    path: Path
    run: Run


@dataclass(frozen=True)
class Candidate:
    """An engine that may be measured, and how."""

    request: BuildRequest
    path: Path
    receipt: Receipt


Told = Callable[[Series, Sequence[int]], None]  # the samples of a configuration so far, for whoever shows them


def benchmark(request: Request, progress: Progress = lambda step: None, told: Told = lambda series, samples: None
              ) -> Result:
    """Measures the engines of MODEL. Raises UsageError where there are none. Ctrl-C leaves an incomplete run."""
    with workspace.opened(artifact.folder_of(request.model, request.out, progress)) as held:
        manifest = artifact.manifest_of(held)
        candidates = _candidates(request, held, manifest)
        folder = held.folder / BENCHMARKS
        folder.mkdir(exist_ok=True)
        run = _new_run(request, manifest)
        run = run if request.fresh else _resumed(folder, run) or run
        path = folder / f"{run.run_id}.json"
        run = replace(run, receipts={c.receipt.file: vars(c.receipt) for c in candidates})
        cases = verify.load_reference(held.folder / REFERENCE)
        feeds = _feeds(request, manifest, cases)
        for batch in request.batches:
            for threads in request.threads:
                for count in request.concurrency:
                    todo = [_series(request, c, batch, threads, count, manifest, run) for c in candidates]
                    for done in _block(request, candidates, todo, feeds, cases, progress, told):
                        run = _with(run, done)
                        record.write(run, path)
        if not run.limits:
            progress("limits of this machine")
            precisions = sorted({c.request.precision for c in candidates})
            rates, bandwidth = limits.measure(precisions, [c.request.runtime for c in candidates], request.device)
            run = replace(run, limits=rates, bandwidth_bytes_per_second=bandwidth)
        run = replace(run, complete=True)
        record.write(run, path)
        return Result(held.folder, path, run)


def _candidates(request: Request, held: Workspace, manifest: Mapping[str, Any]) -> list[Candidate]:
    """The newest intact engine of each runtime and precision that this machine can run."""
    models = {digest: held.folder / (MODEL if name == SAVED_MODEL else name)
              for name, digest in manifest["files"].items()}
    newest: dict[tuple[str, str], Candidate] = {}
    for one in sorted(receipts.every(held.folder / ENGINES), key=lambda r: r.date):
        wanted = one.key["model_sha256"] in models \
            and (not request.runtimes or one.key["runtime"] in request.runtimes) \
            and (not request.precisions or one.key["precision"] in request.precisions)
        if not wanted:
            continue
        with contextlib.suppress(EngineError):  # an engine for another machine or device is no candidate here
            wish = verify.on_device(receipts.request_of(one, models[one.key["model_sha256"]]), request.device)
            if wish.device != request.device or (wish.runtime == verify.AHEAD_OF_TIME and wish.device == "cpu"):
                continue
            receipts.check_machine(one, backend(wish.runtime).identity(receipts.request_of(one, wish.model)))
            path = receipts.check(held.folder / ENGINES, one)
            newest[wish.runtime, wish.precision] = Candidate(wish, path, one)
    if not newest:
        raise UsageError(f"engines of {held.folder}", f"none that run on {request.device}", "one or more",
                         f"python -m pipeline.build {request.model}")
    return [newest[key] for key in sorted(newest)]


def _new_run(request: Request, manifest: Mapping[str, Any]) -> Run:
    settings = Settings(request.steps, request.rounds, request.burn_in, request.min_seconds, request.images,
                        request.seed)
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
    return Run(name, manifest["name"], manifest["files"][MODEL], request.device,
               environment.command(), settings,
               environment.capture(request.device), (), 0.0, (), {}, complete=False)


def _resumed(folder: Path, wanted: Run) -> Run | None:
    """The newest run of the same command that was ended before its time, on this host."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        with contextlib.suppress(UsageError):
            run = record.read(path)
            same = all(getattr(run, name) == getattr(wanted, name)
                       for name in ("model_sha256", "device", "command", "settings"))
            if not run.complete and same and run.environment.host == wanted.environment.host:
                return run
    return None


def _feeds(request: Request, manifest: Mapping[str, Any], cases: verify.Case) -> dict[str, np.ndarray]:
    """What is fed while it is timed: the reference's seeded inputs, or images."""
    if request.images == "random":
        return cases[0]
    from pipeline import calibration

    return calibration.load(request.images, manifest, max(request.batches), None)


def _series(request: Request, candidate: Candidate, batch: int, threads: int, concurrency: int,
            manifest: Mapping[str, Any], run: Run) -> Series:
    """An empty series of the configuration, or what an earlier start of the run has of it."""
    made, wish = candidate.receipt, candidate.request
    flops, parameters = _cost(candidate, manifest)
    moved = sum(_size(s) for s in (*manifest["inputs"], *manifest["outputs"])) * batch
    empty = Series(
        wish.runtime, wish.precision, batch, threads, concurrency, request.mode, "failed", "not measured yet",
        made.file, flops=flops * batch * (3 if request.mode != FORWARD else 1),
        min_bytes=parameters * BYTES.get(wish.precision, 4) + moved, size_bytes=made.size_bytes,
        build_seconds=made.build_seconds)
    return next((s for s in run.series if s.key == empty.key and s.engine == empty.engine), empty)


def _cost(candidate: Candidate, manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Operations for one image, and parameters; a backward pass costs twice a forward one."""
    if "cost" in manifest:
        return round(manifest["cost"]["gflops"] * 1e9), manifest["cost"]["parameters"]
    import onnx
    import onnx_ir as ir

    from export.cost import cost

    model = onnx.load(candidate.request.model.with_name(MODEL))
    found = cost(ir.from_proto(onnx.shape_inference.infer_shapes(model)))
    return round(found.gflops * 1e9), found.parameters


def _size(spec: Mapping[str, Any]) -> int:
    sizes = [n for n in spec["shape"][1:] if isinstance(n, int)]
    return int(np.prod(sizes)) * np.dtype(spec["dtype"]).itemsize


def _with(run: Run, done: Series) -> Run:
    kept = tuple(s for s in run.series if s.key != done.key)
    return replace(run, series=(*kept, done))


# --- one batch size and concurrency: the engines take turns ------------------------------------------------------

@dataclass
class Contestant:
    """A configuration with its processes, and what was measured of it so far."""

    series: Series
    workers: list[Worker]
    steps: int = 0


def _block(request: Request, candidates: Sequence[Candidate], todo: Sequence[Series], feeds: Mapping[str, np.ndarray],
           cases: verify.Case, progress: Progress, told: Told) -> Iterator[Series]:
    """Yields each series as it stands after each of its rounds."""
    with contextlib.ExitStack() as stack:
        running = []
        for candidate, series in zip(candidates, todo, strict=True):
            if len(series.rounds_ns) >= request.rounds:
                continue
            progress(f"{series.name}: start and burn in")
            try:
                one = _started(request, stack, candidate, series, feeds, cases)
            except EngineError as error:
                yield replace(series, status="failed", reason=str(error))
                continue
            running.append(one)
        start, first = monotonic(), min((len(c.series.rounds_ns) for c in running), default=0)
        for number in range(first, request.rounds):
            for one in [c for c in running if len(c.series.rounds_ns) == number]:
                progress(_status(request, one, number, start, first))
                try:
                    one.series = _round(request, one)
                except EngineError as error:
                    running.remove(one)
                    one.series = replace(one.series, status="failed", reason=str(error))
                told(one.series, one.series.rounds_ns[-1] if one.series.rounds_ns else ())
                yield one.series


def _started(request: Request, stack: contextlib.ExitStack, candidate: Candidate, series: Series,
             feeds: Mapping[str, np.ndarray], cases: verify.Case) -> Contestant:
    """Processes that are loaded, proven against the reference, and burnt in. Raises what they raise."""
    wish = candidate.request
    if series.threads:
        wish = replace(wish, options=replace(wish.options, threads=series.threads))
    workers = [stack.enter_context(Worker(wish)) for _ in range(series.concurrency)]
    for worker in workers:
        worker.load(candidate.path)
    expected = verify.cycled(cases[1], series.batch)
    found = workers[0].prepare(verify.cycled(cases[0], series.batch))
    rows = [verify.compare(name, series.batch, found[name], expected[name]) for name in expected]
    for worker in workers:
        worker.prepare(verify.cycled(feeds, series.batch), series.mode)
    burnt, settled = _burnt_in(request, workers)
    series = replace(series, burn_in_ns=series.burn_in_ns or burnt, settled=settled,
                     relative_l2=max(r.relative_l2 for r in rows), top1=min(r.top1 for r in rows))
    per_round = ceil(request.steps / request.rounds / series.concurrency)
    longer = ceil(request.min_seconds / request.rounds / (float(np.median(burnt[-5:])) / 1e9)) if burnt else 0
    return Contestant(series, workers, max(per_round, longer, 1))


def _burnt_in(request: Request, workers: Sequence[Worker]) -> tuple[tuple[int, ...], bool]:
    """Samples of the first process, and whether the latency has settled; all processes do the same steps."""
    samples: list[int] = []
    if request.burn_in is not None:
        samples += _together(workers, request.burn_in)[0].wall if request.burn_in else []
        return tuple(samples), stats.settled(samples)
    while True:
        samples += _together(workers, BURN_IN_LEAST)[0].wall
        settled = stats.settled(samples)
        if (settled and len(samples) >= BURN_IN_ASK) or len(samples) >= BURN_IN_MOST \
                or sum(samples) >= BURN_IN_SECONDS * 1e9:
            return tuple(samples), settled


def _together(workers: Sequence[Worker], steps: int) -> list[Timings]:
    for worker in workers:
        worker.start_timing(steps)
    return [worker.finish_timing() for worker in workers]


def _round(request: Request, one: Contestant) -> Series:
    """One turn of a configuration: its processes run at the same time."""
    series = one.series
    rewarm = _together(one.workers, REWARM)[0].wall
    load = environment.OtherLoad(worker.pid for worker in one.workers)
    start = perf_counter_ns()
    found = _together(one.workers, one.steps)
    wall = perf_counter_ns() - start
    device = {name: (*series.device_ns.get(name, ()), tuple(n for f in found for n in f.device[name]))
              for name in found[0].device}
    state = environment.gpu_state(request.device)
    return replace(
        series, status="measured", reason="", device_ns=device, gpu=(*series.gpu, state) if state else (),
        rewarm_ns=(*series.rewarm_ns, tuple(rewarm)),
        rounds_ns=(*series.rounds_ns, tuple(n for f in found for n in f.wall)), wall_ns=(*series.wall_ns, wall),
        load=(*series.load, load.stop()), peak_bytes=sum(worker.peak_bytes() for worker in one.workers))


def _status(request: Request, one: Contestant, number: int, start: float, first: int) -> str:
    so_far = [n for r in one.series.rounds_ns for n in r]
    median = f", median so far {np.median(so_far) / 1e6:.2f} ms" if so_far else ""
    left = (monotonic() - start) / (number - first) * (request.rounds - number) if number > first else None
    ends = f", {left:.0f} s left at this batch" if left is not None else ""
    return f"{one.series.name}: round {number + 1} of {request.rounds}{median}{ends}"


if __name__ == "__main__":
    from pipeline.cli import run_stage

    run_stage("benchmark")
