"""Proof that the ONNX model is the Keras model: names and shapes of every end point, then numbers.

Shapes are compared with the batch left symbolic, three ways: what the catalog declares by arithmetic, what Keras
says, and what ONNX infers from the cleaned nodes alone. Numbers come from ONNX Runtime on the CPU, with its
optimizations off and on, against Keras on seeded inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from export.convert import BATCH
from export.errors import CheckFailed, ModelError, listed
from export.preprocess import apply

if TYPE_CHECKING:
    import keras

Shape = tuple[int | None, ...]
TOLERANCE = 1e-4  # relative L2 error of an output in float32; right conversions stay near 1e-6
BATCHES = (1, 3)
SMALL = 1024  # elements; shape inference needs the values of small constants (axes, targets), never of weights


@dataclass(frozen=True)
class EndPoint:
    """One row of the shape table. `declared` is None for a model from outside of the catalog."""

    name: str
    declared: Shape | None
    keras: Shape
    onnx: Shape | None

    @property
    def agrees(self) -> bool:
        return self.keras == self.onnx and self.declared in (None, self.keras)


@dataclass(frozen=True)
class Comparison:
    """ONNX Runtime against Keras for one output at one batch size.

    `relative_l2` is |onnx - keras| / |keras|; `top1_agreement` is the share of equal argmax over the last axis.
    """

    output: str
    batch: int
    optimizations: str
    relative_l2: float
    max_abs: float
    top1_agreement: float


# --- shapes ----------------------------------------------------------------------------------------------------

def shape_table(model: ir.Model, keras_shapes: Mapping[str, Shape], declared: Mapping[str, Shape],
                batch: int | None) -> list[EndPoint]:
    """One row an end point. `model` has every end point as an output; its shapes are inferred anew and kept.

    Keras and the catalog leave the batch open; `batch` is the one that the ONNX model was given, if any.
    """
    def fixed(shape: Shape | None) -> Shape | None:
        return shape and tuple(batch if n is None else n for n in shape)

    inferred = infer_shapes(model)
    return [EndPoint(name, fixed(declared.get(name)), fixed(shape) or (), inferred.get(name))
            for name, shape in keras_shapes.items()]


def check_shapes(table: Iterable[EndPoint], declared: Iterable[str]) -> None:
    """Raises CheckFailed that names the first end point whose shapes differ, and how many do."""
    rows = list(table)
    if absent := [name for name in declared if name not in {row.name for row in rows}]:
        raise CheckFailed("end points", f"the model lacks {listed(absent)}", "all that the catalog declares",
                          "this is a fault of the network's builder: please report it")
    wrong = [row for row in rows if not row.agrees]
    if wrong:
        row = wrong[0]
        more = f" ({len(wrong)} of {len(rows)} end points differ)" if len(wrong) > 1 else ""
        raise CheckFailed(f"shape of {row.name}", f"Keras {text(row.keras)}, ONNX {text(row.onnx)}{more}",
                          text(row.declared or row.keras), "the model was not written")


def text(shape: Shape | None) -> str:
    """`Nx56x56x256`, N for an open batch."""
    return "unknown" if shape is None else "x".join("N" if n is None else str(n) for n in shape)


def infer_shapes(model: ir.Model) -> dict[str, Shape]:
    """ONNX's strict shape inference on the nodes; puts the result on every value and returns the outputs'.

    What was known before is dropped first, so nothing but the inputs and the nodes speaks. Weights take part by
    their shape only, which keeps this cheap for a large model.
    """
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    with _weights_as_inputs(model):
        proto = ir.to_proto(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise CheckFailed("ONNX shape inference", " ".join(str(error).split())[:300]) from error
    shapes = {v.name: ir.serde.deserialize_value_info_proto(v, None).shape
              for v in (*inferred.value_info, *inferred.output)}
    for node in model.graph:
        for value in node.outputs:
            value.shape = shapes.get(str(value.name))
    for value in model.graph.outputs:  # a Resize loses the name of the batch
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape = ir.Shape([BATCH, *value.shape[1:]])
    return {str(v.name): _static(v) for v in model.graph.outputs if v.shape is not None}


def _static(value: ir.Value) -> Shape:
    assert value.shape is not None
    return tuple(n if isinstance(n, int) else None for n in value.shape)


@contextmanager
def _weights_as_inputs(model: ir.Model) -> Iterator[None]:
    graph = model.graph
    weights = {n: v for n, v in graph.initializers.items() if v.const_value is not None and v.const_value.size > SMALL}
    initializers, inputs = dict(graph.initializers), list(graph.inputs)
    graph.initializers.clear()
    graph.initializers.update({n: v for n, v in initializers.items() if n not in weights})
    graph.inputs.extend(weights.values())
    try:
        yield
    finally:
        graph.inputs[:] = inputs
        graph.initializers.clear()
        graph.initializers.update(initializers)


def check_file(path: str) -> None:
    """`onnx.checker` with full shape and type inference on the file as written."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed("onnx.checker", " ".join(str(error).split())[:300], "a valid model",
                          "the model was not written") from error


# --- numbers ---------------------------------------------------------------------------------------------------

def seeded_inputs(model: ir.Model, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs by name, the same on every machine: patchy images in [-1, 1) or 0..255, zeros and ones for integers."""
    return {str(v.name): seeded((batch, *(n if isinstance(n, int) else 1 for n in (v.shape or ())[1:])),
                                v.dtype.numpy() if v.dtype is not None else np.dtype(np.float32), seed)
            for v in model.graph.inputs}


def seeded(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """One such input; blocks of up to 8 along every dimension but the first, with a quarter of noise."""
    rng = np.random.Generator(np.random.PCG64([seed, *shape]))
    coarse = rng.random([min(n, 8) if i else n for i, n in enumerate(shape)])
    for axis, n in enumerate(shape):
        coarse = np.take(coarse, np.arange(n) * coarse.shape[axis] // n, axis)
    unit = 0.75 * coarse + 0.25 * rng.random(shape)
    if dtype == np.uint8:
        return (unit * 256).astype(np.uint8)
    return (unit * 2 - 1).astype(dtype) if dtype.kind == "f" else np.rint(unit).astype(dtype)


def keras_outputs(model: keras.Model, inputs: Mapping[str, np.ndarray], outputs: Iterable[str],
                  preprocess: str | None, channels_first: bool) -> dict[str, np.ndarray]:
    """What Keras computes for `inputs`, in the ONNX model's layout. The truth that everything is measured by."""
    fed = [np.moveaxis(x, 1, -1) if channels_first else x for x in inputs.values()]
    fed = [apply(preprocess, x) for x in fed]
    found = model(fed if len(fed) > 1 else fed[0], training=False)
    arrays = {name: np.asarray(found[name]) for name in outputs}
    return {n: np.ascontiguousarray(np.moveaxis(a, -1, 1)) if channels_first and a.ndim == 4 else a
            for n, a in arrays.items()}


def compare(path: str, cases: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]
            ) -> list[Comparison]:
    """The file in ONNX Runtime on the CPU, optimizations off and on, against the (inputs, outputs) of each case."""
    cases, rows = list(cases), []
    for level in ("off", "on"):
        session = _session(path, level)
        for inputs, expected in cases:
            found = dict(zip(expected, session.run(list(expected), dict(inputs)), strict=True))
            batch = len(next(iter(inputs.values())))
            rows += [_compared(name, batch, level, found[name], expected[name]) for name in expected]
    return rows


def _session(path: str, level: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if level == "off" else levels.ORT_ENABLE_ALL
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises one C++ exception type a status code
        raise ModelError("ONNX Runtime", f"does not load the model ({str(error)[:200]})") from error


def _compared(output: str, batch: int, level: str, found: np.ndarray, expected: np.ndarray) -> Comparison:
    if found.shape != expected.shape:
        raise CheckFailed(f"output {output} at batch {batch}", f"shape {found.shape}", str(expected.shape))
    difference = found.astype(np.float64) - expected
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    error = float(np.linalg.norm(difference))
    agreement = 1.0 if found.ndim == 0 or not found.size else float(np.mean(found.argmax(-1) == expected.argmax(-1)))
    return Comparison(output, batch, level, error / norm if norm else error, float(np.abs(difference).max(initial=0)),
                      agreement)


def check_numbers(rows: Iterable[Comparison]) -> None:
    """Raises CheckFailed that names the worst output, if one is further from Keras than TOLERANCE or is not finite."""
    worst = max(rows, key=lambda row: np.inf if np.isnan(row.relative_l2) else row.relative_l2)
    if not worst.relative_l2 <= TOLERANCE:
        raise CheckFailed(
            f"output {worst.output} at batch {worst.batch}, ONNX Runtime optimizations {worst.optimizations}",
            f"relative L2 error {worst.relative_l2:.2e} against Keras", f"at most {TOLERANCE:.0e}",
            "the model is kept as model.onnx.rejected")
