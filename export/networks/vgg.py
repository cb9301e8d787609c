"""VGG, configurations A, A-LRN, B, C, D and E.

[1] Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
    arXiv:1409.1556, table 1
[2] TF-Slim, nets/vgg.py: the dense layers are convolutions, fc6 7x7 VALID; a larger image gives a map of
    class scores, which is averaged.
"""

from __future__ import annotations

import keras
from keras import KerasTensor, layers

from export.catalog import NetworkConfig
from export.networks.layers import (
    ConvStyle,
    LocalResponseNormalization,
    finish,
    global_mean,
    image_input,
    softmax,
    squeeze,
)

STYLE = ConvStyle(5e-4, keras.initializers.GlorotUniform)
WIDTHS = (64, 128, 256, 512, 512)


def build(config: NetworkConfig) -> keras.Model:
    """(batch, height, width, 3) -> `logits` (batch, classes), or `pool5` without the top."""
    scope, row = config.spec.scope, dict(config.spec.row)
    images = x = image_input(config.size)
    ends: dict[str, KerasTensor] = {}
    for block, width in enumerate(WIDTHS, 1):
        for unit in range(1, row[f"conv{block}"] + 1):
            # configuration C: the third convolution of a block is 1x1 [1]
            kernel = 1 if unit == 3 and row.get("pointwise") else 3
            name = f"conv{block}/conv{block}_{unit}"
            ends[name] = x = STYLE.conv(x, f"{scope}/{name}", width, kernel)
        if block == 1 and row.get("lrn"):  # configuration A-LRN; k, n, alpha, beta of AlexNet's paper
            x = LocalResponseNormalization(2, 2.0, 1e-4, 0.75, name=f"{scope}.lrn1")(x)
        ends[f"pool{block}"] = x = layers.MaxPooling2D(2, 2, name=f"{scope}.pool{block}")(x)
    if config.options["include_top"]:
        ends["fc6"] = x = STYLE.conv(x, f"{scope}/fc6", 4096, 7, padding="valid")
        x = layers.Dropout(0.5, name=f"{scope}.dropout6")(x)
        ends["fc7"] = x = STYLE.conv(x, f"{scope}/fc7", 4096, 1)
        x = layers.Dropout(0.5, name=f"{scope}.dropout7")(x)
        x = STYLE.conv(x, f"{scope}/fc8", config.classes, 1, relu=False)
        if x.shape[1:3] != (1, 1):
            x = global_mean(x, f"{scope}.scores")
        ends["logits"] = squeeze(x, "logits")
        ends["predictions"] = softmax(ends["logits"])
    return finish(config.name, images, ends)
