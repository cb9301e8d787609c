"""Keras model -> ONNX model; the only caller of tf2onnx.

The model is traced with its weights as *inputs* of the function, so the graph that tf2onnx walks holds no weights:
its time and memory then depend on the number of layers, not on their size. The weights come back as initializers
of the ONNX graph, and export/graph.py does what tf2onnx's own optimizer would do with many deep copies.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from export.errors import ModelError, listed
from export.passes.constants import fold_constants
from export.preprocess import NORMALISATIONS

if TYPE_CHECKING:
    import keras

BATCH = "batch"
CALLS = frozenset(("PartitionedCall", "StatefulPartitionedCall"))
LOOPS = frozenset(("While", "StatelessWhile", "If", "StatelessIf"))
IR_VERSION = 10  # what ONNX Runtime 1.18 and TensorRT 10 read; nothing here needs a later one


def to_onnx(model: keras.Model, batch: int | None, opset: int) -> ir.Model:
    """The raw ONNX graph of `model`: its inputs by name, one output an end point, weights as initializers.

    `model` returns a dict of end point name -> tensor. Inputs keep Keras's names and layouts, with the first
    dimension `batch`, or "batch" if that is None. Raises ModelError that names the layers ONNX cannot express.
    """
    import tensorflow as tf

    names: list[str] = []

    def outputs_of(result: Any) -> list[Any]:
        names[:] = result
        # an Identity each, so that two names for one tensor stay two outputs
        return [tf.identity(value) for value in result.values()]

    def with_weights(inputs: Any, trainable: Any, others: Any) -> list[Any]:
        return outputs_of(model.stateless_call(trainable, others, inputs, training=False)[0])

    weights = (model.trainable_variables, model.non_trainable_variables)
    inputs = [tf.TensorSpec((batch, *v.shape[1:]), v.dtype, name=v.name) for v in model.inputs]
    fed = inputs if len(inputs) > 1 else inputs[0]
    specs = [[tf.TensorSpec(v.shape, v.dtype) for v in group] for group in weights]
    traced, sources = _traced(with_weights, fed, *specs), [*model.inputs, *weights[0], *weights[1]]
    if _has(traced.graph, LOOPS):  # tf2onnx finds an LSTM or GRU in a loop only if its weights are constants
        traced, sources = _traced(lambda x: outputs_of(model(x, training=False)), fed), list(model.inputs)
    if len(traced.inputs) > len(sources) or _has(traced.graph, CALLS):
        traced = _frozen(traced)  # a SavedModel keeps its variables to itself
    proto = _proto(model.name, traced, opset)
    by_name = {tensor.name: source for tensor, source in zip(traced.inputs, sources, strict=True)}
    return _assemble(proto, by_name, names, batch)


def to_saved_model(model: keras.Model, outputs: Sequence[str], normalisation: str | None, channels_first: bool,
                   folder: Path) -> None:
    """Writes what the ONNX model computes as a SavedModel, for the TensorFlow baseline: same inputs, same outputs."""
    import tensorflow as tf

    step = NORMALISATIONS[normalisation] if normalisation else None

    def fed(value: Any) -> Any:
        value = tf.transpose(value, (0, 2, 3, 1)) if channels_first else value
        if step is None:
            return value
        pixels = tf.cast(value, tf.float32)[..., ::-1 if step.bgr else 1]
        return pixels * tf.constant(step.scale) + tf.constant(step.offset)

    def serve(**inputs: Any) -> dict[str, Any]:
        values = [fed(inputs[v.name]) for v in model.inputs]
        found = model(values if len(values) > 1 else values[0], training=False)
        return {n: tf.transpose(found[n], (0, 3, 1, 2)) if channels_first and len(found[n].shape) == 4 else found[n]
                for n in outputs}

    specs = {}
    for v in model.inputs:
        shape = tuple(v.shape[i] for i in (0, 3, 1, 2)) if channels_first else tuple(v.shape)
        specs[v.name] = tf.TensorSpec(shape, tf.uint8 if step else v.dtype, name=v.name)
    module = tf.Module()
    module.weights = model.weights  # a SavedModel keeps the variables that its module has
    module.serve = tf.function(serve).get_concrete_function(**specs)
    tf.saved_model.save(module, str(folder), {"serving_default": module.serve})


def _traced(function: Any, *specs: Any) -> Any:
    """A concrete function; functions that Keras compiles by XLA (a grouped convolution) are traced into it."""
    import tensorflow as tf

    eager = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        return tf.function(function).get_concrete_function(*specs)
    finally:
        tf.config.run_functions_eagerly(eager)


def _has(graph: Any, types: frozenset[str]) -> bool:
    return any(op.type in types for op in graph.get_operations())


def _frozen(traced: Any) -> Any:
    """The function with its captured variables as constants and its calls inlined."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
    return convert_variables_to_constants_v2(traced, lower_control_flow=False, aggressive_inlining=True)


def _proto(name: str, traced: Any, opset: int) -> onnx.ModelProto:
    from tf2onnx import tfonnx

    with _quiet(), _translated(name, opset):
        graph = tfonnx.process_tf_graph(traced.graph, opset=opset, input_names=[t.name for t in traced.inputs],
                                        output_names=[t.name for t in traced.outputs],
                                        custom_op_handlers={"Erfc": (_erfc, [])})
        proto = graph.make_model(name)
    foreign = sorted({node.op_type for node in proto.graph.node
                      if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type)}
                     | {node.op_type for node in proto.graph.node if node.domain not in ("", "ai.onnx")})
    if foreign:
        raise _unsupported(name, listed(foreign), opset)
    return proto


def _erfc(context: Any, node: Any, name: str, args: list[Any]) -> None:
    """erfc(x) = 1 - erf(x), which tf2onnx does not know; Keras's exact GELU uses it."""
    dtype = context.get_dtype(node.output[0])
    node.type = "Sub"
    erf = context.make_node("Erf", [node.input[0]], dtypes=[dtype], shapes=[context.get_shape(node.output[0])])
    one = context.make_const(f"{name}/one", np.ones((), np.float32))
    context.replace_inputs(node, [one.output[0], erf.output[0]])


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
