"""What two or more networks share: convolutions under TF-Slim's variable scopes.

Every weighted layer is called after the TF-Slim scope that holds its variables, with "." where TF has "/"
(Keras reserves the slash): layer `vgg_16.conv1.conv1_1` holds `vgg_16/conv1/conv1_1/weights` and `/biases`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import KerasTensor, layers


def dotted(scope: str) -> str:
    """A TF-Slim scope as a Keras layer name."""
    return scope.replace("/", ".")


def finish(name: str, images: KerasTensor, end_points: dict[str, KerasTensor]) -> keras.Model:
    """A functional model from `images` to every end point, by name."""
    return keras.Model(images, end_points, name=name)


def image_input(size: tuple[int, int]) -> KerasTensor:
    """(batch, height, width, 3) float32, already normalised as the network was trained."""
    return keras.Input((*size, 3), name="images")


@dataclass(frozen=True)
class ConvStyle:
    """What TF-Slim's arg_scope fixes for one family.

    `weight_decay` is TF-Slim's, for `0.5 * decay * sum(w**2)`; Keras's L2 leaves the half out.
    `batch_norm` holds momentum, epsilon and `scale` (whether gamma exists); None gives a bias instead.
    """

    weight_decay: float
    initializer: Callable[[], keras.initializers.Initializer]
    momentum: float | None = None
    epsilon: float = 1e-3
    scale: bool = True

    def regularizer(self) -> keras.regularizers.Regularizer:
        return keras.regularizers.L2(self.weight_decay / 2)

    def norm(self, x: KerasTensor, scope: str) -> KerasTensor:
        layer = layers.BatchNormalization(
            momentum=self.momentum, epsilon=self.epsilon, scale=self.scale, name=dotted(scope))
        return layer(x)

    def conv(self, x: KerasTensor, scope: str, channels: int | None, kernel: int | tuple[int, int], stride: int = 1,
             padding: str = "same", rate: int = 1, bias: bool | None = None, relu: bool = True,
             norm: bool | None = None) -> KerasTensor:
        """Convolution, then batch norm or bias as the style has it, then ReLU."""
        norm = self.momentum is not None if norm is None else norm
        layer = layers.Conv2D(
            channels, kernel, stride, padding, dilation_rate=rate, use_bias=not norm if bias is None else bias,
            kernel_initializer=self.initializer(), kernel_regularizer=self.regularizer(),
            name=dotted(scope))
        x = layer(x)
        if norm:
            x = self.norm(x, f"{scope}/BatchNorm")
        return layers.ReLU(name=dotted(f"{scope}/Relu"))(x) if relu else x

    def dense(self, x: KerasTensor, scope: str, units: int | None, bias: bool = True, relu: bool = False
              ) -> KerasTensor:
        layer = layers.Dense(units, "relu" if relu else None, bias, self.initializer(),
                             kernel_regularizer=self.regularizer(), name=dotted(scope))
        return layer(x)


def squeeze(x: KerasTensor, name: str) -> KerasTensor:
    """(batch, 1, 1, channels) -> (batch, channels)."""
    return layers.Reshape((x.shape[-1],), name=name)(x)


def global_mean(x: KerasTensor, name: str) -> KerasTensor:
    """(batch, height, width, channels) -> (batch, 1, 1, channels)."""
    return layers.GlobalAveragePooling2D(keepdims=True, name=name)(x)


def softmax(x: KerasTensor) -> KerasTensor:
    """Over the last axis, the classes."""
    return layers.Softmax(name="predictions")(x)


# --- Inception's branches ---------------------------------------------------------------------------------------

ConvRow = tuple[str, int, int | tuple[int, int]]  # name, channels (0 for a 3x3 average pool), kernel
Branches = tuple[tuple[ConvRow, ...], ...]


def stem(style: ConvStyle, x: KerasTensor, scope: str, rows: tuple[tuple[Any, ...], ...],
         ends: dict[str, KerasTensor]) -> KerasTensor:
    """Rows (name, channels, kernel, stride, padding), or (name,) for a 3x3/2 max pool; each is an end point."""
    for name, *conv in rows:
        x = style.conv(x, f"{scope}/{name}", *conv) if conv else max_pool(x, f"{scope}/{name}")
        ends[name] = x
    return x


def chain(style: ConvStyle, x: KerasTensor, scope: str, rows: tuple[ConvRow, ...], reduce: bool = False) -> KerasTensor:
    """One branch; with `reduce` its last convolution takes stride 2 and no padding."""
    for name, channels, kernel in rows:
        stride, padding = (2, "valid") if reduce and name == rows[-1][0] else (1, "same")
        if channels:
            x = style.conv(x, f"{scope}/{name}", channels, kernel, stride, padding)
        else:
            x = layers.AveragePooling2D(kernel, 1, "same", name=dotted(f"{scope}/{name}"))(x)
    return x


def branches(style: ConvStyle, x: KerasTensor, scope: str, rows: Branches) -> KerasTensor:
    """The branches side by side."""
    return join([chain(style, x, f"{scope}/Branch_{i}", row) for i, row in enumerate(rows)], scope)


def reduction(style: ConvStyle, x: KerasTensor, scope: str, rows: Branches) -> KerasTensor:
    """Branches that end in stride 2, and a 3x3/2 max pool: half the height and width."""
    parts = [chain(style, x, f"{scope}/Branch_{i}", row, reduce=True) for i, row in enumerate(rows)]
    return join([*parts, max_pool(x, f"{scope}/Branch_{len(parts)}/MaxPool_1a_3x3")], scope)


def max_pool(x: KerasTensor, scope: str) -> KerasTensor:
    return layers.MaxPooling2D(3, 2, name=dotted(scope))(x)


def join(parts: list[KerasTensor], scope: str) -> KerasTensor:
    return layers.Concatenate(name=dotted(f"{scope}/concat"))(parts)


@keras.saving.register_keras_serializable("enginesmith")
class LocalResponseNormalization(layers.Layer):
    """Across channels: `x / (bias + alpha * sum(x**2 over 2 * radius + 1 channels)) ** beta`, NHWC.

    Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", section 3.3.
    `alpha` is per element, as TensorFlow's op has it; ONNX and Caffe divide theirs by the window size.
    """

    def __init__(self, radius: int, bias: float, alpha: float, beta: float, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.radius, self.bias, self.alpha, self.beta = radius, bias, alpha, beta

    def call(self, x: KerasTensor) -> KerasTensor:
        import tensorflow as tf
        return tf.nn.local_response_normalization(x, self.radius, self.bias, self.alpha, self.beta)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, object]:
        return {**super().get_config(), "radius": self.radius, "bias": self.bias, "alpha": self.alpha,
                "beta": self.beta}
