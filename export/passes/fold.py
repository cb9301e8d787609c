"""Affine steps and zero pads go into the convolution, dense layer or pool beside them.

    (x * W + b) * s + t   = x * (W s) + (b s + t)           s, t one number, or one for each output channel
    Conv(Pad(x, p), q)    = Conv(x, p + q)                  zero pad of height and width only
    MaxPool(Pad(x, p), q) = MaxPool(x, p + q)               where x >= 0 and p is less than the window
    MatMul(x, W) + b      = Gemm(x, W, b)                   x of rank 2

A batch norm at inference is such an `s` and `t`. One that follows a sum or a concatenation, as in ResNet v2, has no
convolution to go into and stays one BatchNormalization.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.passes.values import (
    attributes,
    constant,
    dims,
    integer,
    ints,
    make_constant,
    make_node,
    only_user,
    replace,
    text,
)

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
EPSILON = 1e-5  # the smallest that cuDNN takes


def fold_affine(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in ("Add", "Sub", "Mul", "Div"):
            _fold_into_linear(model.graph, node)


def _operands(node: ir.Node) -> tuple[ir.Value, np.ndarray] | None:
    """The computed and the constant operand; None if there is not one of each, or for `c - x` and `c / x`."""
    left, right = node.inputs
    if left is not None and constant(left) is None and (array := constant(right)) is not None:
        return left, array
    if right is not None and node.op_type in ("Add", "Mul") and constant(right) is None:
        array = constant(left)
        return None if array is None else (right, array)
    return None


def _per_channel(array: np.ndarray, rank: int, axis: int, channels: int) -> np.ndarray | None:
    """`array` as one number a channel, if it is constant over every other dimension and grows none."""
    if array.ndim > rank:
        return None
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if any(n != 1 for i, n in enumerate(full.shape) if i != axis) or full.shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(full.reshape(-1), (channels,)).astype(array.dtype)


def _fold_into_linear(graph: ir.Graph, node: ir.Node) -> None:
    operands = _operands(node)
    if operands is None:
        return
    value, array = operands
    linear = value.producer()
    if linear is None or linear.op_type not in LINEAR or only_user(value) is not node:
        return
    weights, rank = constant(linear.inputs[1]), len(dims(value) or ())
    if weights is None or not rank or not _plain(linear, weights):
        return
    out_axis = _out_axis(linear)
    channels = weights.shape[out_axis]
    bias = constant(linear.inputs[2]) if len(linear.inputs) > 2 and linear.inputs[2] is not None else None
    if len(linear.inputs) > 2 and linear.inputs[2] is not None and (bias is None or bias.ndim != 1):
        return
    vector = _per_channel(array, rank, 1 if linear.op_type.startswith("Conv") else rank - 1, channels)
    if vector is None or (linear.op_type == "MatMul" and (node.op_type in ("Add", "Sub") and rank != 2)):
        return
    new_weights, new_bias = _combined(node.op_type, weights, bias, vector, out_axis)
    inputs = [linear.inputs[0], make_constant(graph, new_weights, str(linear.inputs[1].name))  # type: ignore[union-attr]
              if new_weights is not weights else linear.inputs[1]]
    if new_bias is not None:
        inputs.append(make_constant(graph, new_bias, f"{linear.name}/bias"))
    kind = "Gemm" if linear.op_type == "MatMul" and rank == 2 else linear.op_type
    out = make_node(linear, kind, inputs, attributes(linear), node.outputs[0].shape, value.dtype)
    out.name = node.outputs[0].name
    replace(node, out)
    graph.remove(linear, safe=True)


def _plain(linear: ir.Node, weights: np.ndarray) -> bool:
    """Whether output channels stand on one axis of the weights and the products are not scaled."""
    if linear.op_type == "Gemm":
        return all(linear.attributes[a].as_float() == 1 for a in ("alpha", "beta") if a in linear.attributes) \
            and not integer(linear, "transB", 0)
    if linear.op_type == "MatMul":
        return weights.ndim == 2
    return linear.op_type == "Conv" or integer(linear, "group", 1) == 1


def _out_axis(linear: ir.Node) -> int:
    return 0 if linear.op_type == "Conv" else 1


def _combined(op_type: str, weights: np.ndarray, bias: np.ndarray | None, vector: np.ndarray,
              out_axis: int) -> tuple[np.ndarray, np.ndarray | None]:
    if op_type in ("Mul", "Div"):
        operator = np.multiply if op_type == "Mul" else np.divide
        shape = [1] * weights.ndim
        shape[out_axis] = -1
        return operator(weights, vector.reshape(shape)), None if bias is None else operator(bias, vector)
    shift = vector if op_type == "Add" else -vector
    return weights, shift if bias is None else bias + shift


def form_batch_norms(model: ir.Model) -> None:
    """Mul by, then Add of, one number a channel -> one BatchNormalization."""
    for node in model.graph:
        if node.op_type != "Mul" or (operands := _operands(node)) is None:
            continue
        add = only_user(node.outputs[0])
        if add is None or add.op_type != "Add" or (shift := _operands(add)) is None:
            continue
        value, shape = operands[0], dims(operands[0]) or ()
        if len(shape) < 3 or shape[1] is None or value.dtype != ir.DataType.FLOAT:
            continue
        scale, offset = (_per_channel(a, len(shape), 1, shape[1]) for a in (operands[1], shift[1]))
        if scale is None or offset is None or operands[1].size != shape[1]:
            continue
        _batch_norm(model.graph, add, value, scale, offset)
        model.graph.remove(node, safe=True)


def _batch_norm(graph: ir.Graph, add: ir.Node, value: ir.Value, scale: np.ndarray, offset: np.ndarray) -> None:
    zeros, ones = np.zeros_like(scale), np.full_like(scale, 1 - EPSILON)
    parts = {"scale": scale, "bias": offset, "mean": zeros, "variance": ones}
    inputs = [value, *(make_constant(graph, array, f"{add.name}/{part}") for part, array in parts.items())]
    out = make_node(add, "BatchNormalization", inputs, {"epsilon": EPSILON}, add.outputs[0].shape, value.dtype)
    out.name = add.outputs[0].name
    replace(add, out)


# --- pads ------------------------------------------------------------------------------------------------------

NOT_NEGATIVE = ("Relu", "Sigmoid", "Softmax", "Abs", "Exp")


def merge_pads(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type != "Pad" or text(node, "mode", "constant") != "constant":
            continue
        pads = _spatial_pads(node)
        users = [use.node for use in node.outputs[0].uses()]
        if pads is None or node.outputs[0].is_graph_output() or not users:
            continue
        if all(user.inputs[0] is node.outputs[0] and _takes(user, pads, node.inputs[0]) for user in users):
            for user in users:
                own = ints(user, "pads") or (0,) * len(pads)
                user.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, pads, strict=True)])
                user.replace_input_with(0, node.inputs[0])
            model.graph.remove(node, safe=True)


def _spatial_pads(node: ir.Node) -> list[int] | None:
    """(begins, ends) of the dimensions after batch and channels; None if others are padded, or not with zeros."""
    pads = constant(node.inputs[1])
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if pads is None or (fill is not None and (constant(fill) is None or np.any(constant(fill)))):
        return None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return None
    begins, ends = pads.reshape(2, -1).tolist()
    return None if any(begins[:2]) or any(ends[:2]) or min(begins + ends) < 0 else begins[2:] + ends[2:]


def _takes(user: ir.Node, pads: list[int], source: ir.Value | None) -> bool:
    if text(user, "auto_pad", "NOTSET") != "NOTSET":
        return False
    if user.op_type == "Conv":
        return True
    if user.op_type == "AveragePool":  # counts its own zeros, or has none
        return bool(integer(user, "count_include_pad", 0)) and not any(ints(user, "pads") or ())
    producer = source.producer() if source is not None else None
    window = ints(user, "kernel_shape") or ()
    return (user.op_type == "MaxPool" and producer is not None and producer.op_type in NOT_NEGATIVE
            and all(p < k for p, k in zip(pads, window * 2, strict=True)) and not any(ints(user, "pads") or ()))
