"""Verify stage: every engine of an artifact, loaded and run, against the reference that the export left.

Read downward: an engine is loaded only with intact bytes and on the machine it was built for; its outputs are compared
with the reference at the profile's smallest, best and largest batch; then identical rows and padded rows are checked
against themselves. An engine that fails is searched for the first node that departs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from engines import receipt as receipts
from engines.errors import RuntimeUnavailable, StaleEngine, VerifyFailed
from engines.receipt import Receipt
from engines.runtime import BuildRequest, Runtime, backend
from export.errors import UsageError
from pipeline import artifact, workspace
from pipeline.export import MODEL, REFERENCE, SAVED_MODEL, Progress
from pipeline.workspace import ENGINES

# relative L2 error that a precision may have; a limit of the user's takes its place
LIMITS: Mapping[str, float] = MappingProxyType({"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 5e-2, "fp8": 1e-1,
                                                        "int8": 1e-1})
AHEAD_OF_TIME = "tensorrt-rtx"  # built on `cpu`, for whatever GPU runs it
SELF = 0.1  # rows of a batch may differ among themselves by this share of the limit: kernels differ with the batch


@dataclass(frozen=True)
class Request:
    """What a user asks for. `limits`: precision -> relative L2. `rebuilds`: how many times an engine is built again.
    `device`: the GPU that engines run on which were built ahead of time, for no GPU in particular."""

    model: str
    out: Path = Path("artifacts")
    runtimes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    rebuilds: int = 0
    device: str | None = None


@dataclass(frozen=True)
class Comparison:
    """An engine against the reference, over all images of one batch size and one output.

    `relative_l2` is |engine - reference| / |reference|; `cosine` of the two as vectors; `top1` and `top5`: the share of
    images whose largest reference element is the engine's largest, or among its five largest.
    """

    output: str
    batch: int
    relative_l2: float
    max_abs: float
    cosine: float
    top1: float
    top5: float


@dataclass(frozen=True)
class Row:
    """One engine. `status`: `passed`, `failed`, or `not run` with the reason.

    `identical_rows`, `padding`, `rebuilds`: the largest relative difference of outputs that should be the same.
    """

    runtime: str
    precision: str
    file: str
    status: str
    reason: str = ""
    limit: float = 0.0
    comparisons: tuple[Comparison, ...] = ()
    identical_rows: float | None = None
    padding: float | None = None
    rebuilds: float | None = None


@dataclass(frozen=True)
class Result:
    folder: Path
    rows: tuple[Row, ...]

    def check(self) -> None:
        """Raises VerifyFailed that names the first engine that failed."""
        failed = [row for row in self.rows if row.status == "failed"]
        if failed:
            raise VerifyFailed(f"{failed[0].runtime} {failed[0].precision}", failed[0].reason,
                               "", f"{len(failed)} of {len(self.rows)} engines failed")


def verify(request: Request, progress: Progress = lambda step: None) -> Result:
    """Verifies the engines of MODEL. Raises UsageError where there are none."""
    with workspace.opened(artifact.folder_of(request.model, request.out, progress)) as held:
        manifest, folder = artifact.manifest_of(held), held.folder / ENGINES
        models = {digest: held.folder / (MODEL if name == SAVED_MODEL else name)
                  for name, digest in manifest["files"].items()}
        found = [r for r in receipts.every(folder) if r.key["model_sha256"] in models
                 and (not request.runtimes or r.key["runtime"] in request.runtimes)
                 and (not request.precisions or r.key["precision"] in request.precisions)]
        if not found:
            raise UsageError(f"engines of {held.folder}", "none for this model", "one or more",
                             f"python -m pipeline.build {request.model}")
        cases = load_reference(held.folder / REFERENCE)
        rows = []
        for one in found:
            progress(f"verify {one.name}")
            rows.append(_verified(request, folder, one, models[one.key["model_sha256"]], cases))
        return Result(held.folder, tuple(rows))


Case = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # inputs, outputs


def load_reference(path: Path) -> Case:
    """All images of reference.npz in one batch. Raises UsageError if it holds none."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    groups: list[dict[str, list[np.ndarray]]] = [{}, {}]
    for key in sorted(arrays):
        kind, name = key.split("/", 2)[1:]
        groups[kind == "output"].setdefault(name, []).append(arrays[key])
    if not groups[1]:
        raise UsageError(f"reference {path}", "no outputs in it", "those of a checked export", "export again")
    inputs, outputs = ({name: np.concatenate(parts) for name, parts in group.items()} for group in groups)
    return inputs, outputs


def _verified(request: Request, folder: Path, one: Receipt, model: Path, cases: Case) -> Row:
    wish = receipts.request_of(one, model)
    module, precision = backend(wish.runtime), wish.precision
    limit = request.limits.get(precision, LIMITS[precision])
    row = Row(wish.runtime, precision, one.file, "passed", limit=limit)
    try:
        path = receipts.check(folder, one)
        receipts.check_machine(one, module.identity(wish))
        engine = module.load(on_device(wish, request.device), path)
    except RuntimeUnavailable as error:
        return replace(row, status="not run", reason=str(error))
    except StaleEngine as error:
        return replace(row, status="failed", reason=str(error))
    with engine:
        row = _measured(row, wish, engine, cases)
    if request.rebuilds and row.status == "passed":
        row = _rebuilt(row, wish, cases, request.rebuilds)
    if row.status == "failed" and row.comparisons:
        from pipeline import divergence

        where = divergence.first_node(wish, cases[0], limit)
        row = replace(row, reason=f"{row.reason}; {where}")
    return row


def _measured(row: Row, wish: BuildRequest, engine: Runtime, cases: Case) -> Row:
    profile = wish.profiles[0]
    compared: list[Comparison] = []
    for batch in sorted({profile.min, profile.opt, profile.max}):
        inputs, expected = (cycled(arrays, batch) for arrays in cases)
        found = engine.run(inputs)
        compared += [compare(name, batch, found[name], expected[name]) for name in expected]
    identical, padding = _self_consistency(engine, cases[0], profile.max)
    worst = furthest(compared)
    reasons = [f"output {worst.output} at batch {worst.batch} has relative L2 error {worst.relative_l2:.2e}, limit "
               f"{row.limit:.0e}"] if not worst.relative_l2 <= row.limit else []
    for what, value in (("identical rows of a batch", identical), ("rows of a padded batch", padding)):
        if value is not None and not value <= row.limit * SELF:
            reasons.append(f"{what} differ by {value:.2e}, limit {row.limit * SELF:.0e}")
    return replace(row, status="failed" if reasons else "passed", reason="; ".join(reasons),
                   comparisons=tuple(compared), identical_rows=identical, padding=padding)


def furthest(compared: Sequence[Comparison]) -> Comparison:
    """The one with the largest error; what is not a number is further than any."""
    return max(compared, key=lambda c: np.inf if np.isnan(c.relative_l2) else c.relative_l2)


def cycled(arrays: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """`batch` rows, the first ones again and again."""
    return {name: array[np.arange(batch) % len(array)] for name, array in arrays.items()}


def compare(output: str, batch: int, found: np.ndarray, expected: np.ndarray) -> Comparison:
    """`found` and `expected` of the same shape (batch, ...). Raises VerifyFailed for another shape."""
    if found.shape != expected.shape:
        raise VerifyFailed(f"output {output} at batch {batch}", f"shape {found.shape}", str(expected.shape))
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norm, error = float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
    cosine = float(a @ b / (np.linalg.norm(a) * norm)) if norm and np.any(a) else float(norm == 0)
    scores, truth = (np.reshape(x, (batch, -1)) for x in (found, expected))
    best = truth.argmax(1)
    five = np.argsort(-scores, 1)[:, :5]
    return Comparison(output, batch, error / norm if norm else error, float(np.abs(a - b).max(initial=0)), cosine,
                      float(np.mean(scores.argmax(1) == best)), float(np.mean((five == best[:, None]).any(1))))


def _self_consistency(engine: Runtime, inputs: Mapping[str, np.ndarray], largest: int
                      ) -> tuple[float | None, float | None]:
    """(identical rows, padding): what differs between rows that should not, relative to the outputs' norm."""
    if largest == 1:
        return None, None
    first = {name: array[:1] for name, array in inputs.items()}
    same = engine.run(cycled(first, largest))
    identical = max(difference(value, np.broadcast_to(value[:1], value.shape)) for value in same.values())
    padded = {name: np.concatenate([array, np.zeros((largest - 1, *array.shape[1:]), array.dtype)])
              for name, array in first.items()}
    full = engine.run(padded)
    return identical, max(difference(full[name][:1], same[name][:1]) for name in same)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|; 0 only for equal arrays."""
    if np.array_equal(found, expected):
        return 0.0
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    error = float(np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64)))
    return error / norm if norm else error


def on_device(wish: BuildRequest, device: str | None) -> BuildRequest:
    """An engine that was built ahead of time, for no GPU in particular, runs on the one that is given."""
    ahead = wish.runtime == AHEAD_OF_TIME and wish.device == "cpu" and device is not None
    return replace(wish, device=device) if ahead and device else wish


def _rebuilt(row: Row, wish: BuildRequest, cases: Case, times: int) -> Row:
    """Builds the engine again, `times` times, and compares the outputs of all."""
    module, outputs = backend(wish.runtime), list[dict[str, np.ndarray]]()
    inputs = cycled(cases[0], wish.profiles[0].opt)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(times + 1):
            path = Path(folder) / f"{i}{module.SUFFIX}"
            module.build(wish, path, lambda step: None)
            with module.load(wish, path) as engine:
                outputs.append(engine.run(inputs))
    worst = max(difference(other[name], outputs[0][name]) for other in outputs[1:] for name in other)
    failed = not worst <= row.limit * SELF
    reason = f"rebuilt engines differ by {worst:.2e}, limit {row.limit * SELF:.0e}" if failed else ""
    return replace(row, status="failed" if failed else "passed", reason=reason, rebuilds=worst)


if __name__ == "__main__":
    from pipeline.cli import run_stage

    run_stage("verify")
