"""What a caller feeds and gets: uint8 pixels with the normalisation inside, or channels-first tensors.

    images (uint8) -> Cast -> Transpose -> Gather of channels, if BGR -> Mul -> Add -> the network

The Cast comes first because TensorRT takes uint8 at the border only. With channels first the Transpose is left out,
and 4-D outputs come as (batch, channels, height, width).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.errors import UsageError
from export.passes.layout import inverse, to_channels_first
from export.passes.values import ints, make_constant, make_node
from export.preprocess import NORMALISATIONS

NCHW = to_channels_first(4)


def set_interface(model: ir.Model, normalisation: str | None, channels_first: bool) -> None:
    """Works while every output ends in an Identity of its own. Raises UsageError if the input is no RGB image."""
    if normalisation is None and not channels_first:
        return
    images = _image_input(model)
    entry = _entry(model, images)
    first = entry.outputs[0]
    readers = tuple(first.uses())
    if normalisation is not None:
        images.dtype = ir.DataType.UINT8
        cast = make_node(entry, "Cast", [images], {"to": ir.DataType.FLOAT}, None, first.dtype, "preprocess/cast")
        entry.replace_input_with(0, cast)
        after = _normalised(model.graph, first, readers[0].node, normalisation)
        for use in readers:
            use.node.replace_input_with(use.idx, after)
    if channels_first:
        assert images.shape is not None
        images.shape = ir.Shape([images.shape[i] for i in NCHW])
        assert entry.inputs[0] is not None
        first.replace_all_uses_with(entry.inputs[0])
        model.graph.remove(entry, safe=True)
        _outputs_channels_first(model)


def _image_input(model: ir.Model) -> ir.Value:
    value = model.graph.inputs[0]
    shape = value.shape
    if len(model.graph.inputs) == 1 and shape is not None and len(shape) == 4 and shape[3] == 3 \
            and value.dtype == ir.DataType.FLOAT:
        return value
    found = ", ".join(f"{v.name} {v.shape}" for v in model.graph.inputs)
    raise UsageError("--preprocess and --layout nchw", f"the model takes {found}",
                     "one float32 input (batch, height, width, 3)", "leave the option out")


def _entry(model: ir.Model, images: ir.Value) -> ir.Node:
    """The one Transpose behind the input; made, and undone behind it, if the network reads NHWC itself."""
    readers = tuple(images.uses())
    if len(readers) == 1 and readers[0].node.op_type == "Transpose" and ints(readers[0].node, "perm") == NCHW:
        return readers[0].node
    before = next(iter(model.graph))
    first = make_node(before, "Transpose", [images], {"perm": NCHW}, None, images.dtype, "images/transpose")
    back = make_node(before, "Transpose", [first], {"perm": inverse(NCHW)}, None, images.dtype, "images/transpose")
    for use in readers:
        use.node.replace_input_with(use.idx, back)
    entry = first.producer()
    assert entry is not None
    return entry


def _normalised(graph: ir.Graph, x: ir.Value, before: ir.Node, name: str) -> ir.Value:
    """(batch, 3, height, width) 0..255 -> what export/preprocess.py says, on the same layout."""
    normalisation = NORMALISATIONS[name]
    if normalisation.bgr:
        x = _step(graph, before, "Gather", x, np.array([2, 1, 0], np.int64), axis=1)
    if any(s != 1 for s in normalisation.scale):
        x = _step(graph, before, "Mul", x, np.array(normalisation.scale, np.float32).reshape(1, 3, 1, 1))
    return _step(graph, before, "Add", x, np.array(normalisation.offset, np.float32).reshape(1, 3, 1, 1))


def _step(graph: ir.Graph, before: ir.Node, op_type: str, x: ir.Value, operand: np.ndarray, **attributes: int
          ) -> ir.Value:
    constant = make_constant(graph, operand, f"preprocess/{op_type}")
    return make_node(before, op_type, [x, constant], attributes, None, x.dtype, f"preprocess/{op_type}")


def _outputs_channels_first(model: ir.Model) -> None:
    for i, output in enumerate(model.graph.outputs):
        node = output.producer()
        if output.shape is None or len(output.shape) != 4 or node is None:
            continue
        if node.op_type == "Transpose" and ints(node, "perm") == inverse(NCHW) and node.inputs[0] is not None:
            source = node.inputs[0]  # the Identity that ends the end point
        else:
            last = next(iter(reversed(model.graph)))
            source = make_node(last, "Transpose", [output], {"perm": NCHW}, None, output.dtype, node.name)
            model.graph.remove(source.producer())  # type: ignore[arg-type]
            model.graph.append(source.producer())  # type: ignore[arg-type]
        source.name, output.name = output.name, f"{output.name}/nhwc"
        model.graph.outputs[i] = source
