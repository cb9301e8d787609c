"""Keras model -> ONNX model; the only caller of tf2onnx.

The model is traced with its weights as *inputs* of the function, so the graph that tf2onnx walks holds no weights:
its time and memory then depend on the number of layers, not on their size. The weights come back as initializers
of the ONNX graph, and export/graph.py does what tf2onnx's own optimizer would do with many deep copies.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from export.errors import ModelError, listed
from export.passes.constants import fold_constants

if TYPE_CHECKING:
    import keras

BATCH = "batch"
IR_VERSION = 10  # what ONNX Runtime 1.18 and TensorRT 10 read; nothing here needs a later one


def to_onnx(model: keras.Model, batch: int | None, opset: int) -> ir.Model:
    """The raw ONNX graph of `model`: its inputs by name, one output an end point, weights as initializers.

    `model` returns a dict of end point name -> tensor. Inputs keep Keras's names and layouts, with the first
    dimension `batch`, or "batch" if that is None. Raises ModelError that names the layers ONNX cannot express.
    """
    import tensorflow as tf

    weights = (model.trainable_variables, model.non_trainable_variables)
    names: list[str] = []

    def forward(inputs: Any, *variables: Any) -> Any:
        outputs = model.stateless_call(*variables, inputs, training=False)[0]
        names[:] = outputs
        # an Identity each, so that two names for one tensor stay two outputs
        return [tf.identity(value) for value in outputs.values()]

    specs = [[tf.TensorSpec(v.shape, v.dtype) for v in group] for group in weights]
    inputs = [tf.TensorSpec((batch, *v.shape[1:]), v.dtype, name=v.name) for v in model.inputs]
    traced = tf.function(forward).get_concrete_function(inputs if len(inputs) > 1 else inputs[0], *specs)
    fed = [*model.inputs, *weights[0], *weights[1]]
    if len(traced.inputs) > len(fed) or _has_calls(traced.graph):  # a SavedModel keeps its variables to itself
        traced = _frozen(traced)
    proto = _proto(model.name, traced, opset)
    by_name = {tensor.name: source for tensor, source in zip(traced.inputs, fed, strict=True)}
    return _assemble(proto, by_name, names, batch)


def _has_calls(graph: Any) -> bool:
    return any(op.type in ("PartitionedCall", "StatefulPartitionedCall") for op in graph.get_operations())


def _frozen(traced: Any) -> Any:
    """The function with its captured variables as constants and its calls inlined."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
    return convert_variables_to_constants_v2(traced, lower_control_flow=False)


def _proto(name: str, traced: Any, opset: int) -> onnx.ModelProto:
    from tf2onnx import tfonnx

    with _quiet(), _translated(name, opset):
        graph = tfonnx.process_tf_graph(traced.graph, opset=opset, input_names=[t.name for t in traced.inputs],
                                        output_names=[t.name for t in traced.outputs])
        proto = graph.make_model(name)
    foreign = sorted({node.op_type for node in proto.graph.node
                      if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type)}
                     | {node.op_type for node in proto.graph.node if node.domain not in ("", "ai.onnx")})
    if foreign:
        raise _unsupported(name, listed(foreign), opset)
    return proto


def _unsupported(name: str, what: str, opset: int) -> ModelError:
    return ModelError(f"model {name}", f"ONNX opset {opset} cannot express {what}",
                      "layers made of standard operations", "replace the layer, or choose --outputs before it")


@contextlib.contextmanager
def _translated(name: str, opset: int) -> Iterator[None]:
    """tf2onnx raises plain ValueError, NotImplementedError, AssertionError and others for what it lacks."""
    try:
        yield
    except (ValueError, NotImplementedError, AssertionError, RuntimeError, KeyError) as error:
        raise _unsupported(name, " ".join(str(error).split())[:200] or type(error).__name__, opset) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tf2onnx logs what it also raises."""
    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _assemble(proto: onnx.ModelProto, sources: dict[str, Any], outputs: list[str], batch: int | None) -> ir.Model:
    """Names inputs and outputs, infers shapes while the graph is still small, then puts the weights in.

    TensorFlow's static shapes, where tf2onnx passes them on, help the passes; checks.py infers all of them anew.
    """
    for value in proto.graph.input:
        if batch is None and hasattr(sources[value.name], "_keras_history"):
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    proto.ir_version = IR_VERSION
    model = ir.from_proto(proto)
    fold_constants(model)  # inference does not see through a Cast of constant axes
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))
    for value in list(model.graph.inputs):
        source = sources[str(value.name)]
        if hasattr(source, "_keras_history"):
            value.name = source.name
            continue
        model.graph.inputs.remove(value)
        value.name = source.path
        value.const_value = ir.tensor(np.asarray(source), name=source.path)
        model.graph.register_initializer(value)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    return model
