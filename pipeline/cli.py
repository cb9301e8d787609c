"""The command line: the only place that prints, and that turns an error into an exit code.

Exit 0: done. 1: an error of the user's or the machine's, in one line on stderr. 2: usage. 3: a check failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engines.errors import EngineError
from export.errors import EnginesmithError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.benchmark import Result as BenchmarkResult
    from pipeline.build import Result as BuildResult
    from pipeline.deploy import Checked
    from pipeline.deploy import Result as DeployResult
    from pipeline.export import ExportResult
    from pipeline.record import Run
    from pipeline.report import Result as ReportResult
    from pipeline.run import Result as RunResult
    from pipeline.verify import Result as VerifyResult

INTERRUPTED = 130  # what Typer makes of Ctrl-C

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Keras networks to verified ONNX models and the fastest engines that run them.")


Out = Annotated[Path, typer.Option(help="Folder of the artifacts.")]
RowsAsJson = Annotated[bool, typer.Option("--json", help="Print the rows as JSON, and nothing else.")]


@app.callback()
def stages() -> None:
    """Keras networks to verified ONNX models and the fastest engines that run them."""


@app.command()
def export(
    model: Annotated[str, typer.Argument(
        metavar="MODEL",
        help="A network of the catalog, a .keras or .h5 file, a SavedModel folder, or package.module:function.")],
    out: Out = Path("artifacts"),
    name: Annotated[str | None, typer.Option(help="Name of the artifact folder instead of the model's.")] = None,
    weights: Annotated[str | None, typer.Option(
        metavar="random|imagenet|PATH",
        help="TF checkpoint (V1, V2), .weights.h5 or .keras. Default: random, or a model's own.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes; a checkpoint tells its own.")] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Input height and width in pixels.")] = None,
    batch: Annotated[str, typer.Option(metavar="dynamic|N", help="Batch size of the ONNX model.")] = "dynamic",
    outputs: Annotated[str | None, typer.Option(metavar="NAME,...", help="End points to export, e.g. logits.")] = None,
    option: Annotated[list[str] | None, typer.Option(
        metavar="KEY=VALUE", help="Option of the network, e.g. output_stride=16; repeatable.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 14 to 18.")] = 18,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights and of the check's inputs.")] = 0,
    preprocess: Annotated[str, typer.Option(
        metavar="none|own|tf|caffe|torch|rgb_mean|facenet",
        help="Take uint8 pixels and normalise inside the graph; own: as the network was trained.")] = "none",
    layout: Annotated[str, typer.Option(metavar="nhwc|nchw", help="Layout of images and 4-D outputs.")] = "nhwc",
    saved_model: Annotated[bool, typer.Option(
        "--saved-model", help="Write a SavedModel too, for the TensorFlow baseline.")] = False,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run Python code stored in a .keras file.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Export again, even if an identical export is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON, and nothing else.")] = False,
) -> None:
    """Export MODEL to ONNX, checked against Keras in every shape and in its numbers."""
    from pipeline import export as stage

    request = stage.ExportRequest(
        model, out, name, weights, classes, _size(size), _batch(batch), _names(outputs), _options(option or []), opset,
        seed, preprocess, layout, saved_model, unsafe, force)
    with _progress(as_json) as progress:
        result = stage.export(request, progress)
    if as_json:
        print(json.dumps(result.manifest))
    else:
        _print_export(result)


RuntimeNames = Annotated[list[str] | None, typer.Option(
    "--runtime", metavar="NAME",
    help="onnxruntime, onnxruntime-tensorrt, onnxruntime-tensorrt-rtx, openvino, tensorrt, tensorrt-rtx, tensorflow, "
         "tensorflow-xla; repeatable.")]
PrecisionNames = Annotated[list[str] | None, typer.Option(
    "--precision", metavar="NAME", help="fp32, tf32, fp16, bf16, fp8, int8; repeatable.")]
Artifact = Annotated[str, typer.Argument(
    metavar="MODEL", help="What export takes, an .onnx file, or an artifact folder.")]


@app.command()
def build(
    model: Artifact,
    out: Out = Path("artifacts"),
    runtime: RuntimeNames = None,
    precision: PrecisionNames = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda:N", help="Where the engines run.")] = "cpu",
    profile: Annotated[list[str] | None, typer.Option(
        metavar="MIN,OPT,MAX", help="Batch sizes; repeatable for TensorRT. Default: 1,8,32.")] = None,
    calibrate: Annotated[str, typer.Option(
        metavar="random|DIR|FILE.npy|FILE.npz",
        help="Calibration data for int8: images (by class, if in folders), or the model's inputs (with labels).")]\
        = "random",
    calibration_method: Annotated[str, typer.Option(metavar="minmax|entropy|percentile")] = "minmax",
    calibration_images: Annotated[int, typer.Option(min=1, help="How many of them are used.")] = 64,
    preprocess: Annotated[str | None, typer.Option(
        metavar="tf|caffe|torch|rgb_mean|facenet", help="Normalisation of calibration images, if not own.")] = None,
    keep: Annotated[list[str] | None, typer.Option(
        metavar="NODE", help="ONNX node that stays in float32; repeatable.")] = None,
    autocast: Annotated[bool, typer.Option(
        "--autocast", help="fp16 and bf16 by nvidia-modelopt, which keeps float32 where values overflow.")] = False,
    max_error: Annotated[float | None, typer.Option(
        min=0, help="Search for layers to keep in float32 until the relative L2 error is at most this.")] = None,
    min_agreement: Annotated[float | None, typer.Option(
        min=0, max=1, help="The same for the share of images with the same top-1.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: one for each core.")] = 0,
    graph_optimization: Annotated[str, typer.Option(
        metavar="all|extended|basic|none", help="ONNX Runtime's graph optimizations.")] = "all",
    workspace_mib: Annotated[int | None, typer.Option(min=1, help="TensorRT's workspace limit.")] = None,
    optimization_level: Annotated[int | None, typer.Option(min=0, max=5, help="TensorRT's.")] = None,
    compute_capability: Annotated[list[str] | None, typer.Option(
        metavar="SM", help="Target of TensorRT-RTX, e.g. 86; repeatable.")] = None,
    version_compatible: Annotated[bool, typer.Option("--version-compatible")] = False,
    hardware_compatible: Annotated[bool, typer.Option("--hardware-compatible")] = False,
    strip_weights: Annotated[bool, typer.Option("--strip-weights", help="A plan that is refitted on load.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build again, even if the engine is there.")] = False,
    as_json: RowsAsJson = False,
) -> None:
    """Build engines from MODEL, each with a receipt of what it really runs."""
    from engines.runtime import Options, Profile
    from pipeline import build as stage

    workspace_bytes = None if workspace_mib is None else workspace_mib << 20
    options = Options(threads, graph_optimization, optimization_level, workspace_bytes,
                      tuple(compute_capability or ()), version_compatible, hardware_compatible, strip_weights)
    profiles = tuple(Profile(*_profile(text)) for text in profile or ("1,8,32",))
    request = stage.Request(
        model, out, tuple(runtime or ("onnxruntime",)), tuple(precision or ("fp32",)), device, profiles, options,
        calibrate, calibration_method, calibration_images, preprocess, tuple(keep or ()), autocast,
        stage.Limits(max_error, min_agreement), force)
    with _progress(as_json) as progress:
        result = stage.build(request, progress)
    if as_json:
        print(json.dumps([asdict(row) for row in result.rows]))
    else:
        _print_build(result)


@app.command()
def verify(
    model: Artifact,
    out: Out = Path("artifacts"),
    runtime: RuntimeNames = None,
    precision: PrecisionNames = None,
    max_error: Annotated[list[str] | None, typer.Option(
        metavar="PRECISION=X", help="Limit of the relative L2 error of a precision; repeatable.")] = None,
    rebuilds: Annotated[int, typer.Option(min=0, help="Build each engine again N times; all must agree.")] = 0,
    device: Annotated[str | None, typer.Option(
        metavar="cuda:N", help="GPU to run engines on that were built ahead of time.")] = None,
    as_json: RowsAsJson = False,
) -> None:
    """Check every engine of MODEL against the reference outputs of its export."""
    from pipeline import verify as stage

    request = stage.Request(model, out, tuple(runtime or ()), tuple(precision or ()), _limits(max_error or []),
                            rebuilds, device)
    with _progress(as_json) as progress:
        result = stage.verify(request, progress)
    if as_json:
        print(json.dumps([asdict(row) for row in result.rows]))
    else:
        _print_verify(result)
    result.check()


@app.command()
def benchmark(
    model: Artifact,
    out: Out = Path("artifacts"),
    runtime: RuntimeNames = None,
    precision: PrecisionNames = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1",
    steps: Annotated[int, typer.Option(help="Samples of each configuration, in all rounds together.")] = 100,
    burn_in: Annotated[str, typer.Option(
        metavar="auto|N", help="Steps before; auto: until the latency has settled.")] = "auto",
    min_seconds: Annotated[float, typer.Option(min=0, help="Measure each configuration at least this long.")] = 0.0,
    rounds: Annotated[int, typer.Option(help="Turns that the configurations take.")] = 5,
    mode: Annotated[str, typer.Option(
        metavar="forward|forward-backward", help="forward-backward: TensorFlow's gradients too.")] = "forward",
    threads: Annotated[str, typer.Option(metavar="N,...", help="CPU threads; 0: the engine's own.")] = "0",
    concurrency: Annotated[str, typer.Option(metavar="N,...", help="Processes at the same time.")] = "1",
    images: Annotated[str, typer.Option(metavar="random|DIR", help="What is fed.")] = "random",
    device: Annotated[str, typer.Option(metavar="cpu|cuda:N")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on with an ended run.")] = False,
    baseline: Annotated[Path | None, typer.Option(
        metavar="RUN", help="Earlier run; writes the report, and exits 3 if a configuration got slower.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Share by which it may.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run as JSON, and nothing else.")] = False,
) -> None:
    """Measure the latency of every engine of MODEL, side by side."""
    from pipeline import benchmark as stage

    request = stage.Request(
        model, out, tuple(runtime or ()), tuple(precision or ()), _numbers("batch", batch), steps, _burn_in(burn_in),
        min_seconds, rounds, mode, _numbers("threads", threads), _numbers("concurrency", concurrency), images, device,
        fresh=fresh)
    with _progress(as_json) as progress:
        result = stage.benchmark(request, progress)
    if as_json:
        print(result.path.read_text("utf-8"), end="")
    else:
        _print_benchmark(result)
    if baseline is not None:
        from pipeline import report as report_stage

        report_stage.report(report_stage.Request((result.path,), baseline=baseline, tolerance=tolerance)).check()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(
        metavar="RUN...", help="Files of benchmark runs, or artifact folders: their newest complete run.")],
    out: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Folder of the report. Default: report, in the artifact folder of the run.")] = None,
    baseline: Annotated[Path | None, typer.Option(
        metavar="RUN", help="Earlier run to compare with; exit 3 if a configuration got slower.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Share by which it may.")] = 0.05,
    max_error: Annotated[float | None, typer.Option(
        min=0, help="Relative L2 error that the recommended engine may have. Default: its precision's limit.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0, help="Latency that it may have.")] = None,
    published: Annotated[bool, typer.Option(
        "--published", help="Add published figures of other machines, for scale.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Write RUN... as a page that opens anywhere, and as Markdown, CSV and JSON."""
    from pipeline import report as stage

    request = stage.Request(tuple(runs), out, baseline, tolerance, max_error, max_latency_ms, published)
    result = stage.report(request)
    if as_json:
        print(json.dumps(result.document))
    else:
        _print_report(result)
    result.check()


@app.command()
def run(
    model: Artifact,
    out: Out = Path("artifacts"),
    runtime: RuntimeNames = None,
    precision: PrecisionNames = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda:N", help="Where the engines run.")] = "cpu",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes of the benchmark.")] = "1",
    steps: Annotated[int, typer.Option(help="Samples of each configuration.")] = 100,
    rounds: Annotated[int, typer.Option(help="Turns that the configurations take.")] = 5,
    calibrate: Annotated[str, typer.Option(metavar="random|DIR|FILE", help="Calibration data for int8.")] = "random",
    max_error: Annotated[float | None, typer.Option(
        min=0, help="Relative L2 error that the recommended engine may have. Default: its precision's limit.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0, help="Latency that it may have.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build and measure again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, and nothing else.")] = False,
) -> None:
    """Export, build, verify, benchmark and report MODEL with what this machine has."""
    from pipeline import run as stage

    request = stage.Request(
        model, out, tuple(runtime or ()), tuple(precision or ()), device, _numbers("batch", batch), steps, rounds,
        calibrate, max_error, max_latency_ms, force)
    with _progress(as_json) as progress:
        result = stage.run(request, progress)
    _print_run(result, as_json)
    result.verified.check()


@app.command()
def deploy(
    model: Artifact,
    out: Out = Path("artifacts"),
    repository: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Triton model repository. Default: model_repository, in the artifact folder.")] = None,
    name: Annotated[str | None, typer.Option(help="Name on the server. Default: the artifact's.")] = None,
    runtime: Annotated[str, typer.Option(
        metavar="NAME", help="onnxruntime, onnxruntime-tensorrt, tensorrt, tensorrt-rtx.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(metavar="NAME", help="fp32, tf32, fp16, bf16, fp8, int8.")] = "fp32",
    device: Annotated[str, typer.Option(metavar="cpu|cuda:N", help="Where the engine runs.")] = "cpu",
    max_latency_ms: Annotated[float | None, typer.Option(
        min=0, help="Latency that a request may have; batches and the queue are chosen so that it holds.")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Version; with --rollback the one to go back to.")] = None,
    labels: Annotated[Path | None, typer.Option(
        metavar="FILE", help="A line for each class, for Triton's classification.")] = None,
    response_cache: Annotated[bool, typer.Option(
        "--response-cache", help="Answer equal requests from memory.")] = False,
    reload: Annotated[str | None, typer.Option(
        metavar="URL", help="Server of this repository, which loads it; what it refuses is taken back.")] = None,
    server: Annotated[str, typer.Option(
        metavar="triton|kserve", help="kserve: write an InferenceService beside the repository, too.")] = "triton",
    storage_uri: Annotated[str | None, typer.Option(
        metavar="URI", help="Where the cluster finds the repository, e.g. s3://BUCKET/PATH; for kserve.")] = None,
    min_replicas: Annotated[int, typer.Option(min=0, help="For kserve; 0: none without requests.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="For kserve.")] = 8,
    triton_release: Annotated[str | None, typer.Option(
        metavar="YY.MM", help="The server's container: its TensorRT has to be a plan's.")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Make the version before the live one live.")] = False,
    check: Annotated[str | None, typer.Option(
        metavar="URL", help="Deploy nothing: compare what a server answers with the reference.")] = None,
    load: Annotated[bool, typer.Option("--load", help="With --check: measure it under load.")] = False,
    clients: Annotated[str, typer.Option(metavar="N,...", help="Concurrent clients of --load.")] = "1,2,4,8,16,32,64",
    transport: Annotated[list[str] | None, typer.Option(
        metavar="NAME", help="grpc, http, shared-memory; of --check and --load; repeatable. Default: all.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each number of clients.")] = 3.0,
    grpc_port: Annotated[int | None, typer.Option(help="Of the server. Default: that of its URL and 1.")] = None,
    max_error: Annotated[float | None, typer.Option(
        min=0, help="Relative L2 error that --check allows. Default: the precision's limit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, and nothing else.")] = False,
) -> None:
    """Put a verified engine of MODEL into a Triton model repository, or check the server that serves it."""
    from pipeline import deploy as stage

    request = stage.Request(model, out, repository, name, runtime, precision, device, max_latency_ms, version, labels,
                            response_cache, reload, grpc_port, server, storage_uri, min_replicas, max_replicas,
                            triton_release)
    if check is not None:
        asked = stage.CheckRequest(model, out, name, check, grpc_port, max_error, load, _numbers("clients", clients),
                                   tuple(transport or ()), seconds)
        with _progress(as_json) as progress:
            checked = stage.check(asked, progress)
        _print_checked(checked, as_json)
        checked.require()
        return
    if load:
        raise UsageError("--load", "no server is named", "--check URL --load", "python -m pipeline.serve starts one")
    with _progress(as_json) as progress:
        result = stage.rollback(request) if rollback else stage.deploy(request, progress)
    _print_deploy(result, as_json)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Model repository, or artifact folder with one.")],
    http_port: Annotated[int, typer.Option()] = 8000,
    grpc_port: Annotated[int, typer.Option()] = 8001,
    metrics_port: Annotated[int, typer.Option()] = 8002,
    listen: Annotated[str, typer.Option(
        metavar="ADDRESS", help="The server has no authentication: loopback, unless you know better.")] = "127.0.0.1",
    tritonserver: Annotated[Path | None, typer.Option(
        metavar="PATH", help="An installed server, e.g. with a GPU. Default: one for CPUs, installed once.")] = None,
    health_seconds: Annotated[float, typer.Option(min=0.1, help="How often a real request is sent.")] = 5.0,
) -> None:
    """Serve DIR by a real Triton Inference Server on loopback, until Ctrl-C or SIGTERM."""
    from pipeline import serve as stage
    from pipeline.served import is_loopback

    request = stage.Request(folder, http_port, grpc_port, metrics_port, listen, tritonserver, health_seconds)
    if not is_loopback(listen):
        print(f"warning: {listen} can be reached from other machines, and the server has no authentication",
              file=sys.stderr, flush=True)
    with _progress(False) as progress:
        stage.serve(request, progress, lambda line: print(line, flush=True))


def _numbers(subject: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"{subject} {text!r}", "not a list of numbers", "N,..., e.g. 1,8,32")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _burn_in(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"burn-in {text!r}", "not a number of steps", "auto, or a number")
    return int(text)


def _profile(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"profile {text!r}", "not three batch sizes", "MIN,OPT,MAX, e.g. 1,8,32")
    first, second, third = (int(part) for part in parts)
    return first, second, third


def _limits(pairs: list[str]) -> dict[str, float]:
    from engines.runtime import PRECISIONS

    limits = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1
        if name not in PRECISIONS or not limits[name] >= 0:
            raise UsageError(f"max-error {pair!r}", "not a limit", "PRECISION=X, e.g. int8=0.05")
    return limits


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"size {text!r}", "not a size", "HxW in pixels, e.g. 224x224")
    return int(parts[0]), int(parts[-1])


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UsageError(f"batch {text!r}", "not a batch size", "dynamic, or 1 and more")
    return int(text)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _options(pairs: list[str]) -> dict[str, str]:
    wrong = next((pair for pair in pairs if "=" not in pair), None)
    if wrong is not None:
        raise UsageError(f"option {wrong!r}", "has no value", "KEY=VALUE, e.g. include_top=false")
    return dict(pair.split("=", 1) for pair in pairs)


# --- printing --------------------------------------------------------------------------------------------------

@contextmanager
def _progress(silent: bool) -> Iterator[Callable[[str], None]]:
    """What each step is told to when it starts: a spinner on a terminal, else one line on stderr; none with --json."""
    if silent:
        yield lambda step: None
    elif not sys.stderr.isatty():
        yield lambda step: print(f"{step} ...", file=sys.stderr, flush=True)
    else:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("start")
            yield lambda step: shown.update(task, description=step)


def _console() -> Console:
    """The terminal's width, or one that every table fits into."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 144, markup=False)  # names may have brackets


def _print_lines(console: Console, lines: Iterable[str]) -> None:
    """Each whole, however wide: paths and reasons are copied from here."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _print_export(result: ExportResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from export.checks import text

    console, manifest = _console(), result.manifest
    shapes = Table("end point", "declared", "Keras", "ONNX", box=SIMPLE_HEAD,
                   title=f"Shapes of the end points of {manifest['network']} (N: batch)")
    for row in result.end_points:
        shapes.add_row(row.name, "-" if row.declared is None else text(row.declared), text(row.keras), text(row.onnx))
    console.print(shapes)
    numbers = Table("output", "batch", "optimizations", "relative L2", "max abs", "top-1", box=SIMPLE_HEAD,
                    title="ONNX Runtime against Keras")
    for c in result.comparisons:
        numbers.add_row(c.output, str(c.batch), c.optimizations, f"{c.relative_l2:.1e}", f"{c.max_abs:.1e}",
                        f"{c.top1_agreement:.0%}")
    console.print(numbers)
    cost, steps = manifest["cost"], manifest["seconds"]
    path = result.folder / "model.onnx"
    took = f"{sum(steps.values()):.1f} s: " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in steps.items())
    lines = [f"{cost['parameters'] / 1e6:.2f} million parameters, {cost['gflops']:.2f} GFLOPs an image, "
             f"{path.stat().st_size / 1e6:.1f} MB",
             f"identical export found (--force exports again); it took {took}" if result.reused else took, f"{path}"]
    _print_lines(console, lines)


def _print_build(result: BuildResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from engines.receipt import NONE_YET

    console = _console()
    table = Table("runtime", "precision", "status", "seconds", "MB", "compute layers", "file", box=SIMPLE_HEAD)
    notes = []
    for row in result.rows:
        made = row.receipt
        if made is None:
            table.add_row(row.runtime, row.precision, row.status, "-", "-", "-", "-")
            notes.append(f"refused: {row.why}")
            continue
        layers = ", ".join(f"{count} {name}" for name, count in made.layers.items()) or "none"
        table.add_row(row.runtime, row.precision, row.status, f"{made.build_seconds:.1f}",
                      f"{made.size_bytes / 1e6:.1f}", layers, made.file)
        if row.why and row.why != NONE_YET:
            notes.append(f"built {made.file}: {row.why}")
    console.print(table)
    _print_lines(console, [*notes, f"{result.folder / 'engines'}"])


def _print_benchmark(result: BenchmarkResult) -> None:
    from datetime import datetime

    from pipeline import analysis

    created = datetime.fromisoformat(result.run.environment.date).replace(tzinfo=None)
    for one in result.run.series:
        if one.status == "measured":
            print(f"{one.name}:")
            print("\n".join(analysis.classic_lines(one, created)))
    _print_latencies(result.run)
    _print_lines(_console(), [f"{result.path}"])


def _print_latencies(run: Run) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from pipeline import analysis

    console = _console()
    rows = analysis.rows(run)
    varied = [name for name in ("threads", "concurrency") if len({getattr(r.series, name) for r in rows}) > 1]
    table = Table("runtime", "precision", "batch", *varied, "median ms", "99 % interval", "spread", "images/s",
                  "of limit", "times TensorFlow's speed", "error", box=SIMPLE_HEAD)
    for row in rows:
        one, median, faster = row.series, row.summary.median, row.speedup
        table.add_row(
            one.runtime, one.precision, str(one.batch), *(str(getattr(one, name)) for name in varied),
            f"{median.value / 1e6:.2f}", f"{median.low / 1e6:.2f}-{median.high / 1e6:.2f}",
            f"{row.summary.spread:.1%}", "-" if row.images_per_second is None else f"{row.images_per_second:.1f}",
            "-" if row.of_limit is None else f"{row.of_limit:.0%}",
            "-" if faster is None else f"{faster.ratio:.2f} ({faster.low:.2f}-{faster.high:.2f}) {faster.verdict}",
            "-" if one.relative_l2 is None else f"{one.relative_l2:.1e}")
    console.print(table)
    _print_lines(console, [f"warning: {text}" for text in analysis.warnings(run)])


def _print_report(result: ReportResult) -> None:
    from pipeline import report_text

    lines = []
    for part in result.parts:
        lines += [report_text.summary(part), part.int8, *(f"warning: {text}" for text in part.warnings)]
        lines += [f"slower: {text}" for text in part.regressions]
    _print_lines(_console(), [*lines, f"{result.folder / 'index.html'}"])


def _print_run(result: RunResult, as_json: bool) -> None:
    row = result.choice.row
    latency = None if row is None else row.summary.median.value / 1e6
    ratio = None if row is None or row.speedup is None else row.speedup.ratio
    if as_json:
        print(json.dumps({
            "folder": str(result.folder), "report": str(result.report), "reason": result.choice.reason,
            "engine": None if row is None else row.series.engine, "latency_ms": latency, "ratio_to_tensorflow": ratio}))
        return
    _print_build(result.built)
    _print_verify(result.verified)
    _print_latencies(result.run)
    if row is None:
        lines = [f"no engine is recommended: {result.choice.reason}"]
    else:
        against = "" if ratio is None else f", {ratio:.2f} times as fast as TensorFlow"
        lines = [f"recommended: {row.series.name}: {latency:.2f} ms{against}",
                 f"{result.folder / 'engines' / row.series.engine}"]
    _print_lines(_console(), [*lines, f"{result.report}"])


def _print_deploy(result: DeployResult, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"repository": str(result.repository), "models": result.models,
                          "engine": result.engine and result.engine.file,
                          "choice": result.choice and asdict(result.choice),
                          "findings": [asdict(finding) for finding in result.findings], "notes": result.notes,
                          "service": result.service and str(result.service)}))
        return
    lines = [*(result.choice.why if result.choice else ()), *result.notes]
    lines += [f"{f.level}: {f.file}, {f.field}: {f.found}; expected {f.expected}; {f.mend}" for f in result.findings]
    lines += [f"live: {name} version {version}" for name, version in result.models.items()]
    lines += [f"{result.repository}", *([f"{result.service}"] if result.service else [])]
    _print_lines(_console(), lines)


def _print_checked(result: Checked, as_json: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in result.rows], "load": str(result.path or "")}))
        return
    console = _console()
    table = Table("model", "transport", "batch", "clients", "status", "relative L2", "limit", "top-1", box=SIMPLE_HEAD)
    for row in result.rows:
        numbers = ("-", "-") if row.relative_l2 is None else (f"{row.relative_l2:.1e}", f"{row.top1:.0%}")
        table.add_row(row.model, row.transport, str(row.batch), str(row.clients), row.status, numbers[0],
                      f"{row.limit:.0e}", numbers[1])
    console.print(table)
    _print_lines(console, [f"failed: {row.reason}" for row in result.rows if row.reason])
    if result.load is None:
        return
    table = Table("transport", "clients", "images/s", "p50 ms", "p95", "p99", "batch", "queue", "input", "compute",
                  "output", "way", "errors", box=SIMPLE_HEAD,
                  title="Under load (means in ms from queue to way, which add up: the server's, and the way to it)")
    for level in result.load.levels:
        table.add_row(level.transport, str(level.clients), f"{level.images_per_second:.1f}",
                      *(f"{level.percentile_ms(share):.1f}" for share in (50, 95, 99)), f"{level.mean_batch:.1f}",
                      *(f"{ms:.2f}" for ms in level.rungs_ms.values()), str(sum(level.errors.values())))
    console.print(table)
    errors = {text: count for level in result.load.levels for text, count in level.errors.items()}
    _print_lines(console, [*(f"error: {text} ({count} times)" for text, count in errors.items()), f"{result.path}"])


def _print_verify(result: VerifyResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = _console()
    table = Table("runtime", "precision", "status", "batch", "relative L2", "limit", "cosine", "top-1", "top-5",
                  "same rows", "padded", box=SIMPLE_HEAD)
    notes = []
    for row in result.rows:
        same, padded = ("-" if v is None else f"{v:.0e}" if v else "equal" for v in (row.identical_rows, row.padding))
        if not row.comparisons:
            table.add_row(row.runtime, row.precision, row.status, *["-"] * 8)
        for i, c in enumerate(row.comparisons):
            name = (row.runtime, row.precision, row.status) if i == 0 else ("", "", "")
            table.add_row(*name, str(c.batch), f"{c.relative_l2:.1e}", f"{row.limit:.0e}", f"{c.cosine:.6f}",
                          f"{c.top1:.0%}", f"{c.top5:.0%}", *((same, padded) if i == 0 else ("", "")))
        if row.reason:
            notes.append(f"{row.status}: {row.runtime} {row.precision}: {row.reason}")
        if row.rebuilds is not None:
            notes.append(f"rebuilt: {row.runtime} {row.precision}: outputs differ by {row.rebuilds:.1e}")
    console.print(table)
    _print_lines(console, notes)


# --- entry points ----------------------------------------------------------------------------------------------

def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with its code."""
    try:
        app(arguments, prog_name="enginesmith", standalone_mode=True)
    except (EnginesmithError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("interrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise


def run_stage(stage: str) -> None:
    """`python -m pipeline.<stage> ...` is `enginesmith <stage> ...`."""
    main([stage, *sys.argv[1:]])


