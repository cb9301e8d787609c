"""Parameters and floating point operations of an ONNX model, counted on its graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.passes.values import constant, dims, integer


@dataclass(frozen=True)
class Cost:
    """`parameters`: floating-point weights in the file. `gflops`: 1e9 multiplications and additions for one image.

    Only convolutions and dense layers count, two operations a multiply-add, which is the field's convention; a
    batch norm folded into its convolution costs nothing.
    """

    parameters: int
    gflops: float


def cost(model: ir.Model) -> Cost:
    """Needs inferred shapes on the values; an output whose size is unknown counts as nothing."""
    weights = (v.const_value for v in model.graph.initializers.values())
    parameters = sum(w.size for w in weights if w is not None and w.dtype.is_floating_point())
    return Cost(parameters, sum(_flops(node) for node in model.graph) / 1e9)


def _flops(node: ir.Node) -> int:
    weights = constant(node.inputs[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
    if weights is None:
        return 0
    sizes = [n or 1 for n in (dims(node.outputs[0]) or ())[1:]]
    rows = int(np.prod(sizes)) * 2
    if node.op_type == "Conv":
        return rows * int(np.prod(weights.shape[1:]))
    return rows * weights.shape[1 if node.op_type == "Gemm" and integer(node, "transB", 0) else -2]
