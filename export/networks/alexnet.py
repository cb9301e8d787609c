"""AlexNet, in the form of TensorFlow's benchmark (one tower), with its three dense layers.

[1] Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997
[2] TensorFlow models, tutorials/image/alexnet/alexnet_benchmark.py: channels, strides and paddings
[3] Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012: local
    response normalisation, dropout, weight decay
"""

from __future__ import annotations

import keras
from keras import KerasTensor, layers

from export.catalog import NetworkConfig
from export.networks.layers import ConvStyle, LocalResponseNormalization, finish, image_input, softmax

STYLE = ConvStyle(5e-4, lambda: keras.initializers.TruncatedNormal(stddev=0.1))
# name, channels, kernel, stride, followed by a pool, followed by normalisation
CONVS = (
    ("1", 64, 11, 4, True, True),
    ("2", 192, 5, 1, True, True),
    ("3", 384, 3, 1, False, False),
    ("4", 256, 3, 1, False, False),
    ("5", 256, 3, 1, True, False),
)


def build(config: NetworkConfig) -> keras.Model:
    """(batch, height, width, 3) -> `logits` (batch, classes), or `pool5` without the top."""
    scope = config.spec.scope
    images = x = image_input(config.size)
    ends: dict[str, KerasTensor] = {}
    for number, channels, kernel, stride, pool, lrn in CONVS:
        ends[f"conv{number}"] = x = STYLE.conv(x, f"{scope}/conv{number}", channels, kernel, stride)
        if lrn and config.options["lrn"]:
            x = LocalResponseNormalization(4, 1.0, 0.001 / 9, 0.75, name=f"{scope}.lrn{number}")(x)
        if pool:
            ends[f"pool{number}"] = x = layers.MaxPooling2D(3, 2, name=f"{scope}.pool{number}")(x)
    if config.options["include_top"]:
        x = layers.Flatten(name=f"{scope}.flatten")(x)
        for name in ("fc6", "fc7"):
            ends[name] = x = STYLE.dense(x, f"{scope}/{name}", 4096, relu=True)
            x = layers.Dropout(0.5, name=f"{scope}.dropout{name[-1]}")(x)
        ends["logits"] = STYLE.dense(x, f"{scope}/fc8", config.classes)
        ends["predictions"] = softmax(ends["logits"])
    return finish(config.name, images, ends)
