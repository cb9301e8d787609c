"""A dense layer on (..., channels) without the detour over a matrix.

    Reshape(Reshape(x, (-1, c)) @ W, (..., k)) = x @ W        where only the last dimension differs

Keras multiplies tensors of rank 3 and more as one tall matrix; MatMul takes them as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.values import attributes, constant, dims, make_node, only_user, replace


def unflatten_dense(model: ir.Model) -> None:
    for node in model.graph:
        weights = constant(node.inputs[1]) if node.op_type == "MatMul" else None
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        after = only_user(node.outputs[0])
        if weights is None or weights.ndim != 2 or before is None or after is None:
            continue
        if before.op_type != "Reshape" or after.op_type != "Reshape":
            continue
        source, flat, out = dims(before.inputs[0]), dims(node.inputs[0]), dims(after.outputs[0])
        if source is None or flat is None or out is None or len(flat) != 2 or weights.shape[0] != source[-1]:
            continue
        if source[:-1] != out[:-1] or source[:-1].count(None) > 1:
            continue
        value = make_node(node, "MatMul", [before.inputs[0], node.inputs[1]], attributes(node), after.outputs[0].shape,
                          after.outputs[0].dtype)
        value.name = after.outputs[0].name
        replace(after, value)
        model.graph.remove(node, safe=True)
