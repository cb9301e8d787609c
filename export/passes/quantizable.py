"""Before and after quantization: operations that integer kernels run well.

    BatchNormalization(x) = x s + t        -> a depthwise 1x1 convolution, which quantizes as one operation
    AveragePool(x) = sum(window) / count   -> a depthwise convolution with 1/size, times size/count where windows hang
                                              over the border. ONNX Runtime's integer average pool is ten times slower.
    Concat(DQ(Q(x, s1)), DQ(Q(y, s2)))     -> both in the concatenation's own scale: it then only copies
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from export.passes.values import attributes, constant, dims, integer, ints, make_constant, make_node, replace, text

LARGEST_WINDOW = 25  # elements; beyond it a convolution costs more than the pool


def depthwise_norms(model: ir.Model) -> None:
    graph = model.graph
    for node in [n for n in graph if n.op_type == "BatchNormalization"]:
        arrays: list[Any] = [constant(v) for v in node.inputs[1:]]
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if any(a is None for a in arrays) or shape is None:
            continue
        scale, bias, mean, variance = arrays
        factor = scale / np.sqrt(variance + attributes(node)["epsilon"].as_float())
        window = [1] * (len(shape) - 2)
        kernel = make_constant(graph, factor.reshape(-1, 1, *window).astype(scale.dtype), f"{node.name}/kernel")
        shift = make_constant(graph, (bias - mean * factor).astype(scale.dtype), f"{node.name}/shift")
        _replaced(node, _convolution(node, [kernel, shift], kernel, {"kernel_shape": window}))


def depthwise_pools(model: ir.Model, keep: frozenset[str] = frozenset()) -> None:
    """Average pools of a small window over sizes that are known, but those named in `keep`."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "AveragePool" and n.name not in keep]:
        counts = _window_counts(node)
        window = ints(node, "kernel_shape") or ()
        if counts is None or np.prod(window) > LARGEST_WINDOW:
            continue
        channels = (dims(node.inputs[0]) or ())[1] or 0
        full = int(np.prod(window))
        kernel = make_constant(graph, np.full((channels, 1, *window), 1 / full, np.float32), f"{node.name}/kernel")
        same = {name: value for name, value in attributes(node).items() if name in ("pads", "strides", "kernel_shape")}
        out = _convolution(node, [kernel], kernel, same)
        if (counts != full).any():
            out.name = f"{node.name}/sum"
            share = make_constant(graph, (full / counts).astype(np.float32)[None, None], f"{node.name}/share")
            out = make_node(node, "Mul", [out, share], {}, node.outputs[0].shape, node.outputs[0].dtype,
                            f"{node.name}/border")
        _replaced(node, out)


def _window_counts(node: ir.Node) -> np.ndarray | None:
    """(out height, out width) how many elements each window averages; None where this is no plain 2-D float pool."""
    fed = node.inputs[0]
    source, result = _sizes(fed), _sizes(node.outputs[0])
    window, pads = ints(node, "kernel_shape") or (), ints(node, "pads") or (0, 0, 0, 0)
    plain = text(node, "auto_pad", "NOTSET") == "NOTSET" and not integer(node, "ceil_mode", 0) \
        and set(ints(node, "dilations") or (1,)) == {1} and fed is not None and fed.dtype == ir.DataType.FLOAT
    if not plain or len(window) != 2 or source is None or result is None:
        return None
    if integer(node, "count_include_pad", 0):
        return np.full(result, np.prod(window))
    axes = []
    for axis, step in enumerate(ints(node, "strides") or (1, 1)):
        first = np.arange(result[axis]) * step - pads[axis]
        axes.append(np.minimum(first + window[axis], source[axis]) - np.maximum(first, 0))
    return np.outer(*axes)


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """Height and width, both known, of NCHW whose channels are known too."""
    known = [n for n in (dims(value) or ())[1:] if n is not None]
    return tuple(known[1:]) if len(known) == 3 else None


def _convolution(node: ir.Node, weights: list[ir.Value], kernel: ir.Value, given: dict[str, Any]) -> ir.Value:
    group = kernel.shape[0] if kernel.shape is not None else 1
    return make_node(node, "Conv", [node.inputs[0], *weights], {**given, "group": group}, node.outputs[0].shape,
                     node.outputs[0].dtype)


def _replaced(node: ir.Node, out: ir.Value) -> None:
    out.name = node.outputs[0].name  # what is reported and kept is known by its name
    replace(node, out)


def share_scales(model: ir.Model) -> None:
    """Operands of a Concat are quantized as its result is, whose range holds theirs.

    Not an operand that a pool or a Concat gives: its scale is its source's too.
    """
    for node in [n for n in model.graph if n.op_type == "Concat"]:
        uses = [use.node for use in node.outputs[0].uses()]
        if len(uses) != 1 or uses[0].op_type != "QuantizeLinear":
            continue
        for value in node.inputs:
            dequantize = value.producer() if value is not None else None
            quantize = _source(dequantize, "DequantizeLinear")
            origin = _source(quantize, "QuantizeLinear")
            if dequantize is None or quantize is None or origin is None \
                    or origin.op_type in ("MaxPool", "Concat", "Identity", "Reshape", "Transpose"):
                continue
            for one in (dequantize, quantize):
                for i, shared in enumerate(uses[0].inputs[1:], 1):
                    one.replace_input_with(i, shared)


def _source(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The node that feeds `node`, if that is an `op_type`."""
    return node.inputs[0].producer() if node is not None and node.op_type == op_type and node.inputs[0] else None
