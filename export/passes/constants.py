"""Constant folding: a node whose inputs are all constants becomes a constant.

Kernels arrive transposed and batch norms as chains of Sub, Sqrt, Reciprocal and Mul over the weights; both vanish
here. The common ops go through NumPy, the rest through ONNX's reference evaluator. Results of more than
MAX_GROWTH bytes above their inputs stay computed (an Expand of a scalar does not belong in the file).

Reshape targets that are computed from the batch size at run time become constants where the shape is known:
0 keeps the batch dimension, and its name, and -1 stands for one other unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from export.passes.values import constant, dims, make_constant, replace

MAX_GROWTH = 1 << 20
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


def _reshape(data: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return data.reshape([data.shape[i] if n == 0 else int(n) for i, n in enumerate(shape)])


def _squeeze(data: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.squeeze(data, None if axes is None else tuple(int(a) for a in axes))


NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Sqrt": np.sqrt, "Neg": np.negative,
    "Reciprocal": lambda x: (1 / x).astype(x.dtype), "Identity": lambda x: x,
    "Reshape": _reshape, "Squeeze": _squeeze,
    "Transpose": lambda x, perm=None: np.ascontiguousarray(np.transpose(x, perm)),
}


def fold_constants(model: ir.Model) -> None:
    for node in model.graph:
        if not node.inputs or node.op_type in RANDOM or node.domain not in ("", "ai.onnx"):
            continue
        if any(v is not None and constant(v) is None for v in node.inputs) or _has_subgraph(node):
            continue
        arrays = [constant(v) for v in node.inputs]
        results = _evaluate(node, arrays, model)
        if sum(r.nbytes for r in results) > MAX_GROWTH + sum(a.nbytes for a in arrays if a is not None):
            continue
        name = next((v.name for v in node.inputs if v is not None and v.name), node.name) or "constant"
        replace(node, *(make_constant(model.graph, r, name) for r in results))


def _has_subgraph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _evaluate(node: ir.Node, arrays: list[Any], model: ir.Model) -> list[np.ndarray]:
    known = {"perm"} if node.op_type == "Transpose" else set()
    if node.op_type in NUMPY and set(node.attributes) <= known and None not in [type(a) for a in arrays if a is None]:
        attributes = {name: a.as_ints() for name, a in node.attributes.items()}
        return [np.asarray(NUMPY[node.op_type](*arrays, **attributes))]
    return _reference(node, arrays, model)


def _reference(node: ir.Node, arrays: list[Any], model: ir.Model) -> list[np.ndarray]:
    """One node in ONNX's reference evaluator."""
    proto = ir.to_proto(node)
    feeds = {name: array for name, array in zip(proto.input, arrays, strict=True) if name}
    graph = onnx.helper.make_graph(
        [proto], "constant",
        [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
         for n, a in feeds.items()],
        [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output])
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    return [np.asarray(r) for r in ReferenceEvaluator(
        onnx.helper.make_model(graph, opset_imports=opsets)).run(None, feeds)]


def fix_reshape_targets(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type != "Reshape":
            continue
        target = reshape_target(dims(node.inputs[0]), dims(node.outputs[0]))
        known = constant(node.inputs[1])
        if target is not None and (known is None or not np.array_equal(target, known)):
            node.replace_input_with(1, make_constant(model.graph, target, f"{node.name}/shape"))


def reshape_target(source: tuple[int | None, ...] | None, target: tuple[int | None, ...] | None) -> np.ndarray | None:
    """The constant that reshapes `source` to `target`; None where more than one size is unknown.

    An unknown first size on both sides is the batch if the others have equal products; 0 keeps its name.
    """
    if source is None or target is None or target.count(None) > 1 or 0 in target:
        return None
    sizes = [-1 if n is None else n for n in target]
    if source[:1] == target[:1] == (None,) and None not in source[1:] and _product(source[1:]) == _product(target[1:]):
        sizes[0] = 0
    return np.array(sizes, np.int64)


def _product(sizes: tuple[int | None, ...]) -> int:
    return math.prod(n or 0 for n in sizes)
