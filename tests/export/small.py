"""Small Keras models of every kind of layer that users bring, and the way through the exporter in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export import checks, convert, graph, models
from export.checks import Comparison, EndPoint

PIXELS = (16, 16, 3)


def filled(model: Any) -> Any:
    """`model` with values in every weight that would be 0 or 1 at the start."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "variance" in weight.name:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif weight.name in ("moving_mean", "beta", "gamma", "bias", "alpha"):
            weight.assign(rng.normal(0, 0.3, weight.shape))
    return model


def stack(*layers: str, shape: tuple[int, ...] = PIXELS) -> Callable[[], Any]:
    """A builder of Sequential; a layer is written as Keras's call, `Conv2D(8, 3)`."""
    def build() -> Any:
        import keras

        keras.utils.set_random_seed(0)
        made = [eval(layer, dict(vars(keras.layers))) for layer in layers]
        return filled(keras.Sequential([keras.Input(shape), *made], name="small"))
    return build


def functional(body: Callable[[Any, Any], Any], shape: tuple[int, ...] = PIXELS, dtype: str = "float32"
               ) -> Callable[[], Any]:
    """A builder of keras.Model from `body(layers, input)`."""
    def build() -> Any:
        import keras

        keras.utils.set_random_seed(0)
        fed = keras.Input(shape, dtype=dtype)
        return filled(keras.Model(fed, body(keras.layers, fed), name="small"))
    return build


def _squeeze_excite(layers: Any, x: Any) -> Any:
    y = layers.Conv2D(8, 3)(x)
    gate = layers.Reshape((1, 1, 8))(layers.Dense(8, "sigmoid")(layers.GlobalAveragePooling2D()(y)))
    return layers.Multiply()([y, gate])


def _attention(layers: Any, x: Any) -> Any:
    tokens = layers.Reshape((196, 8))(layers.Conv2D(8, 3)(x))
    return layers.MultiHeadAttention(2, 4)(tokens, tokens)


def _two_inputs() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    conv = keras.layers.Conv2D
    both = {"sum": keras.layers.Add()([conv(4, 3)(left), conv(4, 3)(right)]), "side": conv(2, 1)(left)}
    return filled(keras.Model([left, right], both, name="small"))


@dataclass(frozen=True)
class Small:
    """`transposes` are what must be left; `operations`, if given, all other operations that must."""

    build: Callable[[], Any]
    transposes: int
    operations: Mapping[str, int] | None = None


# one Transpose behind an image input, one more before an image output
MODELS: dict[str, Small] = {
    "separable": Small(stack("SeparableConv2D(8, 3)", "BatchNormalization()", "ReLU()",
                             "DepthwiseConv2D(3, 2, 'same')", "BatchNormalization()"), 2, {"Conv": 3, "Relu": 1}),
    "transposed": Small(stack("Conv2DTranspose(8, 3, 2, 'same')", "BatchNormalization()", "LeakyReLU()",
                              "Conv2D(4, 3)"), 2),
    "nearest": Small(stack("Conv2D(4, 3)", "UpSampling2D((2, 3))", "Conv2D(4, 3)"), 2, {"Conv": 2, "Resize": 1}),
    "bilinear": Small(stack("Conv2D(4, 3)", "UpSampling2D(interpolation='bilinear')", "Conv2D(4, 3)"), 2),
    "flatten": Small(stack("Conv2D(8, 3)", "Flatten()", "Dense(10)", "BatchNormalization()", "Dense(5, 'softmax')"), 1,
                     {"Conv": 1, "Reshape": 1, "Gemm": 2, "Softmax": 1}),
    "flatten_pooled": Small(stack("Conv2D(8, 3)", "MaxPooling2D()", "Flatten()", "Dropout(.5)", "Dense(10, 'relu')",
                                  "Dense(5)"), 1, {"Conv": 1, "MaxPool": 1, "Reshape": 1, "Gemm": 2, "Relu": 1}),
    "pads": Small(stack("ZeroPadding2D(1)", "Conv2D(8, 3, activation='relu')", "ZeroPadding2D(1)",
                        "MaxPooling2D(3, 2)"), 2, {"Conv": 1, "Relu": 1, "MaxPool": 1}),
    "average_pad": Small(stack("Conv2D(4, 3)", "ZeroPadding2D(((1, 0), (0, 1)))", "AveragePooling2D(2)"), 2),
    "squeeze_excite": Small(functional(_squeeze_excite), 2),
    "concat_rows": Small(functional(lambda k, x: k.Concatenate(axis=1)(
        [k.Conv2D(4, 3, padding="same")(x), k.Conv2D(4, 1)(x)])), 2, {"Conv": 2, "Concat": 1}),
    "softmax_map": Small(functional(lambda k, x: k.Softmax()(k.Conv2D(4, 3)(x))), 2, {"Conv": 1, "Softmax": 1}),
    "layer_norm": Small(functional(lambda k, x: k.Conv2D(4, 1)(k.LayerNormalization()(k.Conv2D(8, 3)(x)))), 2),
    "group_norm": Small(functional(lambda k, x: k.GroupNormalization(4)(k.Conv2D(8, 3)(x))), 2),
    "permute": Small(functional(lambda k, x: k.Permute((2, 1, 3))(k.Conv2D(4, 3)(x))), 2),
    "attention": Small(functional(_attention), 2),
    "conv3d": Small(stack("Conv3D(4, 3)", "BatchNormalization()", "MaxPooling3D()", "Flatten()", "Dense(3)",
                          shape=(8, 8, 8, 2)), 1, {"Conv": 1, "MaxPool": 1, "Reshape": 1, "Gemm": 1}),
    "dense": Small(stack("Dense(8, 'gelu')", "Dense(3)", shape=(7,)), 0),
    "lstm": Small(stack("LSTM(8)", "Dense(3)", shape=(7, 4)), 1),
    "embedding": Small(functional(lambda k, x: k.Dense(2)(k.GlobalAveragePooling1D()(k.Embedding(10, 4)(x))),
                                  (6,), "int32"), 0),
    "two_inputs": Small(_two_inputs, 4, {"Conv": 3, "Add": 1}),
    "same_tensor_twice": Small(functional(lambda k, x: [k.Conv2D(4, 3, name="c")(x)] * 2), 3),
    "activations": Small(stack("Conv2D(4, 3)", "PReLU()", "Conv2D(4, 3)", "PReLU(shared_axes=[1, 2])", "ELU()",
                               "Activation('swish')", "Activation('hard_silu')", "Activation('mish')"), 2),
    "crop_and_slice": Small(functional(lambda k, x: k.Cropping2D(((1, 2), (3, 1)))(k.Conv2D(4, 3)(x))[:, ::2, 1:, :3]),
                            2),
    "reshape_map": Small(functional(lambda k, x: k.Reshape((7, 7, 16))(k.Conv2D(4, 3)(x))), 2),
    "dilated": Small(functional(lambda k, x: k.Dense(3)(k.GlobalMaxPooling2D()(
        k.Conv2D(4, 3, dilation_rate=2)(x)))), 1, {"Conv": 1, "ReduceMax": 1, "Gemm": 1}),
    "grouped": Small(stack("Conv2D(6, 3, groups=3)", "BatchNormalization()"), 2, {"Conv": 1}),
    "dense_map": Small(functional(lambda k, x: k.Dense(4, "relu")(k.Conv2D(8, 3)(x))), 2, {"Conv": 2, "Relu": 1}),
    "unit_norm": Small(functional(lambda k, x: k.UnitNormalization()(k.Conv2D(8, 3)(x))), 2),
    "rescaled": Small(stack("Rescaling(1 / 127.5, -1)", "Conv2D(4, 3, padding='same')", "BatchNormalization()"), 2),
    "conv1d": Small(stack("Conv1D(8, 3)", "BatchNormalization()", "MaxPooling1D()", "GlobalAveragePooling1D()",
                          "Dense(3)", shape=(20, 5)), 1,
                    {"Conv": 1, "MaxPool": 1, "ReduceMean": 1, "Gemm": 1}),
}


@dataclass(frozen=True)
class Converted:
    table: list[EndPoint]
    comparisons: list[Comparison]
    operations: Counter[str]
    data: bytes


def convert_small(model: Any, path: Path, batch: int | None = None, opset: int = 18, normalisation: str | None = None,
                  channels_first: bool = False) -> Converted:
    """Through every step of the exporter, to a file and back out of ONNX Runtime."""
    named = models.named(model, "small", (), None)
    onnx_model = convert.to_onnx(named, batch, opset)
    graph.clean(onnx_model)
    shapes = {name: tuple(tensor.shape) for name, tensor in named.output.items()}
    table = checks.shape_table(onnx_model, shapes, {}, batch)
    graph.finish(onnx_model, tuple(shapes), normalisation, channels_first)
    checks.infer_shapes(onnx_model)
    graph.save(onnx_model, path, {"enginesmith.network": "small"})
    checks.check_file(str(path))
    cases = []
    for size in checks.BATCHES if batch is None else (batch,):
        fed = checks.seeded_inputs(onnx_model, size, 0)
        cases.append((fed, checks.keras_outputs(named, fed, tuple(shapes), normalisation, channels_first)))
    operations = Counter(node.op_type for node in onnx_model.graph)
    return Converted(table, checks.compare(str(path), cases), operations, path.read_bytes())
