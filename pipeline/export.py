"""Export stage: a Keras network to a verified ONNX model in an artifact folder.

Read downward: a request becomes a Keras model with its weights, that becomes an ONNX graph, the graph is cleaned
and checked against Keras in shapes and in numbers, and the result is committed to `<out>/<name>/` in one step.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from engines.digest import sha256
from export import catalog
from export.catalog import NetworkConfig
from export.errors import CheckFailed, UsageError, listed
from export.quiet import load_tensorflow
from pipeline import workspace
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    import keras
    import numpy as np
    import onnx_ir as ir

    from export.checks import Comparison, EndPoint

    Case = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # inputs, Keras's outputs

MODEL, REFERENCE, SAVED_MODEL = "model.onnx", "reference.npz", "saved_model"
TOOLS = ("enginesmith", "keras", "tensorflow", "tf2onnx", "onnx", "onnx-ir", "onnxruntime", "numpy")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportRequest:
    """What a user asks for. `weights` None means random for a catalog network, its own for a user's model.

    `size` is (height, width) in pixels, `batch` None a dynamic batch, `outputs` empty the default ones.
    """

    model: str
    out: Path = Path("artifacts")
    name: str | None = None
    weights: str | None = None
    classes: int | None = None
    size: tuple[int, int] | None = None
    batch: int | None = None
    outputs: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    opset: int = 18
    seed: int = 0
    preprocess: str = "none"
    layout: str = "nhwc"
    saved_model: bool = False
    unsafe: bool = False
    force: bool = False
    checks: bool = True


@dataclass(frozen=True)
class ExportResult:
    """`manifest` is what stands in manifest.json; `reused` says that an identical export was there already."""

    folder: Path
    manifest: dict[str, Any]
    end_points: tuple[EndPoint, ...]
    comparisons: tuple[Comparison, ...]
    reused: bool


def export(request: ExportRequest, progress: Progress = lambda step: None) -> ExportResult:
    """Exports `request`. Raises UsageError, WeightsError, ModelError, WorkspaceError or CheckFailed."""
    _check(request)
    source = _source(request)
    with workspace.opened(request.out / source.name) as folder:
        earlier = None if request.force else folder.manifest()
        if earlier is not None and source.recipe and earlier.get("recipe") == source.recipe:
            return _reused(folder, earlier)
        return _export(request, source, folder, progress)


# --- what is asked for -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Source:
    """Where the Keras model comes from. `recipe` identifies the export as far as it is known without Keras."""

    name: str
    config: NetworkConfig | None
    weights: str
    recipe: dict[str, Any]


def _check(request: ExportRequest) -> None:
    from export import models, preprocess

    if not 14 <= request.opset <= 18:
        raise UsageError(f"opset {request.opset}", "tf2onnx writes 14 to 18", "one of those")
    if request.layout not in ("nhwc", "nchw"):
        raise UsageError(f"layout {request.layout!r}", "unknown", "nhwc or nchw")
    if request.batch is not None and request.batch < 1:
        raise UsageError(f"batch {request.batch}", "not a batch size", "dynamic, or 1 and more")
    if models.is_user_model(request.model) and (request.options or request.classes):
        raise UsageError(f"model {request.model}", "a model of your own has no --option and no --classes",
                         "those of the catalog", f"catalog: {listed(tuple(catalog.NETWORKS))}")
    preprocess.resolve(request.preprocess, "tf")


def _source(request: ExportRequest) -> Source:
    from export import models

    if models.is_user_model(request.model):
        weights = request.weights or "own"
        if weights in ("random", "imagenet"):
            raise UsageError(f"weights {weights}", f"{request.model} is not in the catalog", "own, or a weights file")
        name = request.name or models.artifact_name(request.model)
        return Source(name, None, weights, _recipe(request, None, weights))
    config, weights = _catalog_source(request)
    return Source(request.name or config.name, config, weights, _recipe(request, config, weights))


def _catalog_source(request: ExportRequest) -> tuple[NetworkConfig, str]:
    """Classes and options as the weights have them, where the user did not say."""
    weights, options, classes = request.weights or "random", dict(request.options), request.classes
    spec = catalog.find(request.model)
    if weights == "imagenet":
        classes = classes or (1000 if spec.classes else None)
        if "aux_logits" in spec.options:  # keras.applications publishes no auxiliary head
            options.setdefault("aux_logits", "false")
    config = catalog.configure(spec.name, request.size, classes, options)
    if classes is None and spec.heads and _is_checkpoint(weights):
        from export.weights import checkpoint_classes
        load_tensorflow()
        found = checkpoint_classes(weights, spec)
        if found is not None:
            config = catalog.configure(spec.name, request.size, found - bool(config.options.get("drop_background")),
                                       options)
    return config, weights


def _is_checkpoint(weights: str) -> bool:
    return weights not in ("random", "imagenet") and not weights.endswith((".h5", ".keras"))


def _recipe(request: ExportRequest, config: NetworkConfig | None, weights: str) -> dict[str, Any]:
    """Everything that decides the bytes of the model; empty where only building the model can tell."""
    if config is None and ":" in request.model:
        return {}
    asked = asdict(request)
    for key in ("out", "name", "force", "options", "classes", "size", "weights"):
        del asked[key]
    asked["outputs"] = list(request.outputs)
    built = {"size": list(config.size), "classes": config.classes, "options": dict(config.options)} if config \
        else {"size": request.size and list(request.size), "file": _digest(request.model)}
    source = weights if weights in ("random", "imagenet", "own") else _digest(weights)
    return {**asked, **built, "weights": source, "tools": tool_versions()}


def _digest(path: str) -> str:
    """sha256 over every file of a checkpoint, a Keras file or a SavedModel folder; empty where there is none."""
    root = Path(path.removesuffix(".index"))
    files = sorted(root.rglob("*")) if root.is_dir() else [root, *sorted(root.parent.glob(f"{root.name}.*"))]
    digests = [f"{file.name} {sha256(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else ""


def tool_versions() -> dict[str, str]:
    """The installed versions of what takes part in an export."""
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    names = {"tensorflow": ("tensorflow", "tensorflow-cpu"), "onnxruntime": ("onnxruntime", "onnxruntime-gpu")}
    versions = {tool: next((found[n] for n in names.get(tool, (tool,)) if n in found), "") for tool in TOOLS}
    return {tool: version for tool, version in versions.items() if version} | {"python": platform.python_version()}


# --- the export ------------------------------------------------------------------------------------------------

def _export(request: ExportRequest, source: Source, folder: Workspace, progress: Progress) -> ExportResult:
    from export import checks, convert, graph, preprocess, weights
    from export.cost import cost

    clock = Clock(progress)
    clock.start("load TensorFlow")
    load_tensorflow()
    clock.start("load model")
    model = _load(request, source)
    outputs = _outputs(request, source, tuple(model.output))
    digest = weights.fingerprint(model)
    declared = catalog.declared_shapes(source.config) if source.config else {}
    normalisation = preprocess.resolve(request.preprocess, _own_normalisation(source))

    clock.start("convert")
    onnx_model = convert.to_onnx(model, request.batch, request.opset)
    graph.clean(onnx_model)

    clock.start("check shapes")
    keras_shapes = {name: tuple(tensor.shape) for name, tensor in model.output.items()}
    table = checks.shape_table(onnx_model, keras_shapes, declared, request.batch)
    checks.check_shapes(table, declared)

    clock.start("write")
    graph.finish(onnx_model, outputs, normalisation, request.layout == "nchw")
    checks.infer_shapes(onnx_model)
    described = _described(request, source, normalisation, digest)
    staged = folder.stage(MODEL, lambda path: graph.save(onnx_model, path, described))

    comparisons: list[Comparison] = []
    reference: dict[str, np.ndarray] = {}
    if request.checks:
        clock.start("check numbers")
        checks.check_file(str(staged))
        cases = _cases(request, model, onnx_model, outputs, normalisation)
        comparisons = checks.compare(str(staged), cases)
        _accept(folder, comparisons)
        reference = reference_arrays(cases)

    if request.saved_model:
        clock.start("SavedModel")
        folder.stage(SAVED_MODEL, lambda path: convert.to_saved_model(model, outputs, normalisation,
                                                                      request.layout == "nchw", path))

    clock.start("commit")
    folder.stage(REFERENCE, lambda path: save_arrays(path, reference))
    manifest = {
        "format": 1, "name": source.name, "recipe": source.recipe,
        **{key.removeprefix("enginesmith."): value for key, value in described.items()},
        "inputs": _specs(onnx_model.graph.inputs), "outputs": _specs(onnx_model.graph.outputs),
        "opset": request.opset, "seed": request.seed, "cost": asdict(cost(onnx_model)),
        "end_points": [asdict(row) for row in table], "tolerance": checks.TOLERANCE,
        "comparisons": [asdict(row) for row in comparisons], "checked": request.checks,
        "seconds": clock.stop(), "tools": tool_versions(),
    }
    written = folder.commit(manifest, (MODEL, REFERENCE, *((SAVED_MODEL,) if request.saved_model else ())))
    return ExportResult(folder.folder, written, tuple(table), tuple(comparisons), reused=False)


class Clock:
    """Wall seconds of each step; tells `progress` when one starts."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.seconds, self.step, self.since = progress, dict[str, float](), "", perf_counter()

    def start(self, step: str) -> None:
        self.stop()
        self.step, self.since = step, perf_counter()
        self.progress(step)

    def stop(self) -> dict[str, float]:
        if self.step:
            self.seconds[self.step] = round(perf_counter() - self.since, 3)
        return self.seconds


def _load(request: ExportRequest, source: Source) -> keras.Model:
    """The Keras model, with its weights, returning a dict of end point name -> tensor."""
    from export import models, networks, weights

    if source.config is not None:
        model = networks.build(source.config)
        weights.load(model, source.config, source.weights, request.seed)
        return model
    model = models.load(request.model, request.unsafe, request.seed, request.outputs, request.size)
    if source.weights != "own":
        weights.load_keras_file(model, source.weights)
    weights.check_finite(model, request.model)
    return model


def _outputs(request: ExportRequest, source: Source, end_points: tuple[str, ...]) -> tuple[str, ...]:
    """The chosen end points. Raises UsageError that suggests the nearest name."""
    chosen = request.outputs or ((source.config.default_output,) if source.config else end_points)
    for name in chosen:
        if name not in end_points:
            near = difflib.get_close_matches(name, end_points, n=1, cutoff=0.3)
            raise UsageError(f"output {name!r}", f"{source.name} has no such end point",
                             f"one of {listed(end_points)}", f"did you mean {near[0]}?" if near else "")
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"outputs {','.join(chosen)}", "one stands there twice", "each once")
    return chosen


def _own_normalisation(source: Source) -> str | None:
    if source.config is None:
        return None
    spec = source.config.spec
    return spec.imagenet[1] if source.weights == "imagenet" and spec.imagenet else spec.preprocess


def _described(request: ExportRequest, source: Source, normalisation: str | None, digest: str) -> dict[str, str]:
    """What the ONNX file says of itself."""
    options = dict(source.config.options) | {"classes": source.config.classes} if source.config else {}
    weights = source.weights if source.weights in ("random", "imagenet", "own") else Path(source.weights).name
    return {"enginesmith.network": source.config.name if source.config else source.name,
            "enginesmith.options": json.dumps(options), "enginesmith.preprocess": normalisation or "none",
            "enginesmith.layout": request.layout, "enginesmith.weights": weights,
            "enginesmith.weights_sha256": digest}


def _cases(request: ExportRequest, model: keras.Model, onnx_model: ir.Model, outputs: tuple[str, ...],
           normalisation: str | None) -> list[Case]:
    """Seeded inputs and Keras's outputs for them, at every batch size that is checked."""
    from export import checks

    cases = []
    for batch in checks.BATCHES if request.batch is None else (request.batch,):
        inputs = checks.seeded_inputs(onnx_model, batch, request.seed)
        cases.append((inputs, checks.keras_outputs(model, inputs, outputs, normalisation, request.layout == "nchw")))
    return cases


def _accept(folder: Workspace, comparisons: list[Comparison]) -> None:
    from export import checks

    try:
        checks.check_numbers(comparisons)
    except CheckFailed:
        folder.reject(MODEL)
        raise


def reference_arrays(cases: list[Case]) -> dict[str, np.ndarray]:
    """`batch_<n>/input/<name>` and `batch_<n>/output/<name>`."""
    return {f"batch_{len(next(iter(inputs.values())))}/{kind}/{name}": array
            for inputs, outputs in cases for kind, arrays in (("input", inputs), ("output", outputs))
            for name, array in arrays.items()}


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _specs(values: Any) -> list[dict[str, Any]]:
    return [{"name": v.name, "dtype": v.dtype.numpy().name,
             "shape": [n if isinstance(n, int) else str(n) for n in v.shape]} for v in values]


def _reused(folder: Workspace, manifest: dict[str, Any]) -> ExportResult:
    from export.checks import Comparison, EndPoint

    def shape(value: Any) -> Any:
        return value if value is None else tuple(value)

    table = tuple(EndPoint(row["name"], shape(row["declared"]), shape(row["keras"]), shape(row["onnx"]))
                  for row in manifest["end_points"])
    rows = tuple(Comparison(**row) for row in manifest["comparisons"])
    return ExportResult(folder.folder, manifest, table, rows, reused=True)


if __name__ == "__main__":
    from pipeline.cli import run_stage

    run_stage("export")
