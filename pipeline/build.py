"""Build stage: an artifact's ONNX model to the engines that this machine can run, or that it can build ahead of time.

Read downward: for each runtime and precision, the model's form is made if it is missing, an engine with the same
receipt is looked for, and if there is none one is built, read back, and put in place with its receipt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from engines import receipt
from engines.digest import sha256
from engines.errors import BuildError, PrecisionError, RuntimeUnavailable
from engines.receipt import Receipt
from engines.runtime import PRECISIONS, BuildRequest, Built, Options, Profile, backend
from export.errors import MissingPackage, UsageError
from pipeline import artifact, workspace
from pipeline.export import MODEL, SAVED_MODEL, Progress
from pipeline.workspace import ENGINES, Workspace


@dataclass(frozen=True)
class Limits:
    """`max_error`: relative L2 over all images and outputs. `min_agreement`: share of images with the same top-1."""

    max_error: float | None = None
    min_agreement: float | None = None

    def holds(self, error: float, agreement: float) -> bool:
        return (self.max_error is None or error <= self.max_error) \
            and (self.min_agreement is None or agreement >= self.min_agreement)


@dataclass(frozen=True)
class Request:
    """What a user asks for. `calibrate`: `random`, a folder, an .npy or an .npz file (see calibration.py)."""

    model: str
    out: Path = Path("artifacts")
    runtimes: tuple[str, ...] = ("onnxruntime",)
    precisions: tuple[str, ...] = ("fp32",)
    device: str = "cpu"
    profiles: tuple[Profile, ...] = (Profile(1, 8, 32),)
    options: Options = field(default_factory=Options)
    calibrate: str = "random"
    method: str = "minmax"
    images: int = 64
    preprocess: str | None = None
    keep: tuple[str, ...] = ()
    autocast: bool = False
    limits: Limits = field(default_factory=Limits)
    force: bool = False


@dataclass(frozen=True)
class Row:
    """One engine: `built`, `cached`, or `refused` with the reason. `why` says why a cached one was not used."""

    runtime: str
    precision: str
    status: str
    why: str
    receipt: Receipt | None = None


@dataclass(frozen=True)
class Result:
    folder: Path
    rows: tuple[Row, ...]


def build(request: Request, progress: Progress = lambda step: None) -> Result:
    """Builds every runtime in every precision asked for. Raises the error of the only engine, if it is refused."""
    for precision in request.precisions:
        if precision not in PRECISIONS:
            raise UsageError(f"precision {precision!r}", "unknown", f"one of {', '.join(PRECISIONS)}")
    with workspace.opened(artifact.folder_of(request.model, request.out, progress)) as held:
        rows = [_row(request, held, runtime, precision, progress)
                for runtime in request.runtimes for precision in request.precisions]
        return Result(held.folder, tuple(rows))


def _row(request: Request, held: Workspace, runtime: str, precision: str, progress: Progress) -> Row:
    """A combination that a runtime cannot give is a row that says so, unless it is all that was asked for."""
    try:
        return _engine(request, held, runtime, precision, progress)
    except (RuntimeUnavailable, PrecisionError, BuildError, MissingPackage) as error:
        if len(request.runtimes) * len(request.precisions) == 1:
            raise
        return Row(runtime, precision, "refused", str(error))


def _engine(request: Request, held: Workspace, runtime: str, precision: str, progress: Progress) -> Row:
    module = backend(runtime)
    variant = module.variant(precision, request.device)
    if variant is None:
        raise BuildError(f"{runtime} on {request.device}", f"{precision} is not a precision it computes in")
    model = held.folder / _variant(request, held, variant, progress)
    manifest = artifact.manifest_of(held)
    wish = BuildRequest(model, runtime, precision, request.device, _profiles(request, manifest), request.options)
    source = SAVED_MODEL if runtime.startswith("tensorflow") else model.name
    wanted = receipt.key(wish, module.identity(wish), manifest["files"].get(source, ""))
    folder = held.folder / ENGINES
    folder.mkdir(exist_ok=True)
    found = receipt.find(folder, wanted)
    if isinstance(found, Receipt) and not request.force:
        return Row(runtime, precision, "cached", "", found)
    name = receipt.engine_id(wanted) + module.SUFFIX
    staged, start = folder / (name + workspace.NEW), perf_counter()
    built = module.build(wish, staged, lambda step: progress(f"build {runtime} {precision}: {step}"))
    check_precision(wish, built)
    made = receipt.make(wanted, staged, name, built, perf_counter() - start)
    _put(folder, made)
    return Row(runtime, precision, "built", "forced" if isinstance(found, Receipt) else found, made)


def _put(folder: Path, made: Receipt) -> None:
    """The engine first, its receipt last: without one an engine is never loaded."""
    path = folder / f"{receipt.engine_id(made.key)}.json"
    path.unlink(missing_ok=True)
    (folder / (made.file + workspace.NEW)).replace(folder / made.file)
    staged = path.with_name(path.name + workspace.NEW)
    staged.write_text(json.dumps(asdict(made), indent=1) + "\n", "utf-8")
    staged.replace(path)


def _profiles(request: Request, manifest: Mapping[str, Any]) -> tuple[Profile, ...]:
    """A model with a fixed batch has that one profile."""
    shape = manifest["inputs"][0]["shape"]
    batch = shape[0] if shape else 1
    return (Profile(batch, batch, batch),) if isinstance(batch, int) else request.profiles


def check_precision(wish: BuildRequest, built: Built) -> None:
    """Raises PrecisionError unless most compute layers run in the precision that the engine is named after."""
    layers, total = built.layers.get(wish.precision, 0), sum(built.layers.values())
    if 2 * layers < total:
        counts = ", ".join(f"{n} {p}" for p, n in built.layers.items())
        raise PrecisionError(f"{wish.runtime} in {wish.precision}", f"{counts} compute layers in {built.source}",
                             f"most of {total} in {wish.precision}", "choose another precision for this device")


# --- the model's form for a precision --------------------------------------------------------------------------

def _variant(request: Request, held: Workspace, variant: str, progress: Progress) -> str:
    """The file name of the form, which is made unless the manifest has it from the same recipe."""
    if not variant:
        return MODEL
    manifest, name = artifact.manifest_of(held), f"model.{variant}.onnx"
    integer, source = variant.startswith(("int8", "fp8")), held.folder / MODEL
    recipe: dict[str, Any] = {"source": manifest["files"][MODEL], "keep": list(request.keep), **vars(request.limits)}
    if integer or request.limits != Limits():
        recipe |= {"calibrate": _digest(request.calibrate), "images": request.images, "preprocess": request.preprocess}
    recipe |= {"method": request.method} if integer else {"autocast": request.autocast}
    if manifest.get("variants", {}).get(name, {}).get("recipe") == recipe and name in manifest["files"]:
        return name
    from export import precision

    progress(f"{variant} model")
    images = _calibration(request, manifest) if integer or request.limits != Limits() else {}

    ranges = None if request.limits == Limits() else held.folder / f"calibration.json{workspace.NEW}"

    def make(path: Path, more: tuple[str, ...]) -> None:
        keep = request.keep + more
        if variant == "fp8":
            precision.to_fp8(source, path, images, keep)
        elif integer:
            precision.to_int8(source, path, variant, images, request.method, keep, cache=ranges)
        else:
            (precision.autocast if request.autocast else precision.to_half)(source, path, variant, keep)

    kept = list(request.keep)

    def write(path: Path) -> None:
        if request.limits == Limits():
            make(path, ())
        else:
            from pipeline import precision_search

            kept.extend(precision_search.search(source, make, images, request.limits, path, progress))

    held.stage(name, write)
    described = {"recipe": recipe, "kept": kept}
    held.commit({**manifest, "variants": {**manifest.get("variants", {}), name: described}}, (name,))
    return name


def _digest(calibrate: str) -> str:
    """What calibration data is known by: names, sizes and dates of the files of a folder, or a file's bytes."""
    path = Path(calibrate)
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        entries = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(path.rglob("*"))]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return calibrate


def _calibration(request: Request, manifest: Mapping[str, Any]) -> dict[str, Any]:
    from pipeline import calibration

    return calibration.load(request.calibrate, manifest, request.images, request.preprocess)


if __name__ == "__main__":
    from pipeline.cli import run_stage

    run_stage("build")
