"""Operations that TensorFlow takes apart, put together again.

    Reshape(Tile(Unsqueeze(x, a + 1), r at a + 1), merge a and a + 1)  = Resize(x, scale r at a), nearest
    Resize(Resize(x, s), t)                                            = Resize(x, s t), nearest, whole numbers
    Squeeze(f(Unsqueeze(x, 2)), 2)                                     = f(x) in one dimension      f a Conv or a pool

The first is Keras's UpSampling2D, the last its Conv1D and pools over time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.passes.values import attributes, constant, dims, ints, make_constant, make_node, only_user, replace, text

NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
WINDOWS = ("Conv", "MaxPool", "AveragePool")


def resize_repeats(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Tile":
            _repeat(model.graph, node)
    for node in model.graph:
        if node.op_type == "Resize":
            _merge_resizes(model.graph, node)


def _repeat(graph: ir.Graph, tile: ir.Node) -> None:
    times, merge = constant(tile.inputs[1]), only_user(tile.outputs[0])
    unsqueeze = tile.inputs[0].producer() if tile.inputs[0] is not None else None
    if times is None or merge is None or merge.op_type != "Reshape" or unsqueeze is None \
            or unsqueeze.op_type != "Unsqueeze" or only_user(unsqueeze.outputs[0]) is not tile:
        return
    source, out, axes = dims(unsqueeze.inputs[0]), dims(merge.outputs[0]), constant(unsqueeze.inputs[1])
    repeated = [i for i, n in enumerate(times) if n != 1]
    if source is None or out is None or axes is None or len(axes) != 1 or len(repeated) != 1:
        return
    axis = repeated[0] - 1
    size, rank = source[axis] if axis > 0 else None, len(source)
    factor = int(times[axis + 1])
    if int(axes[0]) % (rank + 1) != axis + 1 or size is None or rank < 3:
        return
    if out != (*source[:axis], size * factor, *source[axis + 1:]):
        return
    scales = np.ones(rank, np.float32)
    scales[axis] = factor
    _resized(graph, merge, unsqueeze.inputs[0], scales)
    graph.remove([tile, unsqueeze], safe=True)


def _merge_resizes(graph: ir.Graph, node: ir.Node) -> None:
    first = node.inputs[0].producer() if node.inputs[0] is not None else None
    if first is None or first.op_type != "Resize" or only_user(first.outputs[0]) is not node:
        return
    scales = [_whole_scales(one) for one in (first, node)]
    if scales[0] is not None and scales[1] is not None:
        _resized(graph, node, first.inputs[0], scales[0] * scales[1])
        graph.remove(first, safe=True)


def _whole_scales(node: ir.Node) -> np.ndarray | None:
    """The scales of a nearest Resize that repeats every element a whole number of times."""
    scales = constant(node.inputs[2]) if len(node.inputs) == 3 else None
    known = scales is not None and all(text(node, key, "") == value for key, value in NEAREST.items())
    return scales if known and scales is not None and np.array_equal(scales, np.rint(scales)) else None


def _resized(graph: ir.Graph, node: ir.Node, source: ir.Value | None, scales: np.ndarray) -> None:
    """Puts one nearest Resize of `source` in the place of `node`."""
    operand = make_constant(graph, scales, f"{node.name}/scales")
    old = node.outputs[0]
    out = make_node(node, "Resize", [source, None, operand], NEAREST, old.shape, old.dtype)
    out.name = old.name
    replace(node, out)


def drop_unit_height(model: ir.Model) -> None:
    for node in model.graph:
        squeeze = only_user(node.outputs[0]) if node.op_type in WINDOWS and len(node.outputs) == 1 else None
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if squeeze is None or squeeze.op_type != "Squeeze" or before is None or before.op_type != "Unsqueeze":
            continue
        height = ints(node, "pads")
        if any(_axes(one) != [2] for one in (squeeze, before)) or (height is not None and (height[0] or height[2])):
            continue
        inputs, kernel = [before.inputs[0], *node.inputs[1:]], ints(node, "kernel_shape")
        if node.op_type == "Conv":
            weights = constant(node.inputs[1])
            if weights is None or weights.ndim != 4 or weights.shape[2] != 1:
                continue
            inputs[1] = make_constant(model.graph, weights[:, :, 0], str(node.inputs[1].name))  # type: ignore[union-attr]
        elif kernel is None or len(kernel) != 2 or kernel[0] != 1:
            continue
        old = squeeze.outputs[0]
        out = make_node(node, node.op_type, inputs, _one_dimensional(node), old.shape, old.dtype)
        out.name = old.name
        replace(squeeze, out)
        model.graph.remove(node, safe=True)


def _axes(node: ir.Node) -> list[int] | None:
    """The constant axes of a Squeeze or Unsqueeze."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if axes is None else axes.tolist()


def _one_dimensional(node: ir.Node) -> dict[str, object]:
    """The node's attributes without the first of its two spatial dimensions."""
    changed: dict[str, object] = attributes(node)
    for name in ("kernel_shape", "strides", "dilations", "pads"):
        if (values := ints(node, name)) is not None:
            changed[name] = list(values[1::2] if name == "pads" else values[1:])
    return changed
