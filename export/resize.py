"""A model of its own for the server: uint8 images of any size to the size that a network takes.

Bilinear with antialias, as Pillow resizes: the triangle filter is as wide as the scale asks. Within 1 of 255 it is
Pillow's, which rounds between the two directions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18  # Resize has antialias from there


def write(path: Path, name: str, height: int, width: int, nchw: bool) -> None:
    """`name`, uint8 (batch, any height, any width, 3), to `name` of the same type and (batch, height, width, 3), or
    (batch, 3, height, width) for `nchw`. Sizes are in pixels."""
    shape: list[str | int | None] = ["batch", 3, height, width] if nchw else ["batch", height, width, 3]
    out = f"{name}_resized"
    constants = [numpy_helper.from_array(np.array([height, width], np.int64), "size"),
                 numpy_helper.from_array(np.array(0, np.float32), "least"),
                 numpy_helper.from_array(np.array(255, np.float32), "most")]
    nodes = [
        helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        # all four sizes, since ONNX Runtime 1.32 refuses a Resize of two axes whose input has unknown sizes
        helper.make_node("Shape", ["planes"], ["batch and planes"], end=2),
        helper.make_node("Concat", ["batch and planes", "size"], ["sizes"], axis=0),
        helper.make_node("Resize", ["planes", "", "", "sizes"], ["resized"], mode="linear", antialias=1,
                         coordinate_transformation_mode="half_pixel",
                         exclude_outside=1),  # at the border the weights of what is there are scaled up to one
        helper.make_node("Round", ["resized"], ["rounded"]),
        helper.make_node("Clip", ["rounded", "least", "most"], ["clipped"]),
        *([] if nchw else [helper.make_node("Transpose", ["clipped"], ["rows"], perm=[0, 2, 3, 1])]),
        helper.make_node("Cast", ["clipped" if nchw else "rows"], [out], to=TensorProto.UINT8)]
    graph = helper.make_graph(
        nodes, "resize", [helper.make_tensor_value_info(name, TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info(out, TensorProto.UINT8, shape)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
