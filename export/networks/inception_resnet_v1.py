"""Inception-ResNet-v1 as facenet publishes it: an embedding of faces.

[1] Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv:1602.07261
[2] facenet, src/models/inception_resnet_v1.py: names, widths, and the bottleneck
"""

from __future__ import annotations

import keras
from keras import KerasTensor, layers

from export.catalog import NetworkConfig
from export.networks.layers import (
    Branches,
    ConvStyle,
    branches,
    dotted,
    finish,
    image_input,
    reduction,
    softmax,
    stem,
)

# [2] trains with weight decay 5e-4 (its published models' argument) and Glorot initialisation
STYLE = ConvStyle(5e-4, keras.initializers.GlorotUniform, momentum=0.995, scale=False)

STEM = (("Conv2d_1a_3x3", 32, 3, 2, "valid"), ("Conv2d_2a_3x3", 32, 3, 1, "valid"),
        ("Conv2d_2b_3x3", 64, 3, 1, "same"), ("MaxPool_3a_3x3",), ("Conv2d_3b_1x1", 80, 1, 1, "valid"),
        ("Conv2d_4a_3x3", 192, 3, 1, "valid"), ("Conv2d_4b_3x3", 256, 3, 2, "valid"))
# the branches of a residual unit, concatenated and brought back to the unit's width by a 1x1
UNITS: dict[str, Branches] = {
    "block35": ((("Conv2d_1x1", 32, 1),),
                (("Conv2d_0a_1x1", 32, 1), ("Conv2d_0b_3x3", 32, 3)),
                (("Conv2d_0a_1x1", 32, 1), ("Conv2d_0b_3x3", 32, 3), ("Conv2d_0c_3x3", 32, 3))),
    "block17": ((("Conv2d_1x1", 128, 1),),
                (("Conv2d_0a_1x1", 128, 1), ("Conv2d_0b_1x7", 128, (1, 7)), ("Conv2d_0c_7x1", 128, (7, 1)))),
    "block8": ((("Conv2d_1x1", 192, 1),),
               (("Conv2d_0a_1x1", 192, 1), ("Conv2d_0b_1x3", 192, (1, 3)), ("Conv2d_0c_3x1", 192, (3, 1)))),
}
# branches whose last convolution is 3x3/2 VALID; a 3x3/2 max pool joins them
REDUCTIONS: dict[str, Branches] = {
    "Mixed_6a": ((("Conv2d_1a_3x3", 384, 3),),
                 (("Conv2d_0a_1x1", 192, 1), ("Conv2d_0b_3x3", 192, 3), ("Conv2d_1a_3x3", 256, 3))),
    "Mixed_7a": ((("Conv2d_0a_1x1", 256, 1), ("Conv2d_1a_3x3", 384, 3)),
                 (("Conv2d_0a_1x1", 256, 1), ("Conv2d_1a_3x3", 256, 3)),
                 (("Conv2d_0a_1x1", 256, 1), ("Conv2d_0b_3x3", 256, 3), ("Conv2d_1a_3x3", 256, 3))),
}
# scope of the repeated units, kind, scale of the residual, end point after them, reduction after that
STAGES = (("Repeat", "block35", 0.17, "Mixed_5a", "Mixed_6a"),
          ("Repeat_1", "block17", 0.10, "Mixed_6b", "Mixed_7a"),
          ("Repeat_2", "block8", 0.20, "Mixed_8a", None))


def build(config: NetworkConfig) -> keras.Model:
    """(batch, height, width, 3) -> `logits` and `embeddings` (batch, embedding), the latter of L2 norm 1.

    With `classes`, `logits` is facenet's softmax classifier on the embedding instead, (batch, classes).
    """
    scope, repeats = config.spec.scope, dict(config.spec.row)
    images = x = image_input(config.size)
    ends: dict[str, KerasTensor] = {}
    x = stem(STYLE, x, scope, STEM, ends)
    for repeat, kind, scale, end_point, reduced in STAGES:
        for index in range(1, repeats[kind] + 1):
            x = _residual(x, f"{scope}/{repeat}/{kind}_{index}", UNITS[kind], scale)
        ends[end_point] = x
        if reduced:
            ends[reduced] = x = reduction(STYLE, x, f"{scope}/{reduced}", REDUCTIONS[reduced])
    ends["Mixed_8b"] = x = _residual(x, f"{scope}/Block8", UNITS["block8"], 1.0, relu=False)
    ends["PreLogitsFlatten"] = x = layers.GlobalAveragePooling2D(name="PreLogitsFlatten")(x)
    x = layers.Dropout(0.2, name=f"{scope}.Dropout")(x)
    x = STYLE.dense(x, f"{scope}/Bottleneck", int(config.options["embedding"] or 0), bias=False)
    ends["PreLogits"] = x = STYLE.norm(x, f"{scope}/Bottleneck/BatchNorm")
    ends["embeddings"] = layers.UnitNormalization(name="embeddings")(x)
    if config.classes:  # outside of the network's scope in [2]
        ends["logits"] = STYLE.dense(x, "Logits", config.classes)
        ends["predictions"] = softmax(ends["logits"])
    else:
        ends["logits"] = x
    return finish(config.name, images, ends)


def _residual(x: KerasTensor, scope: str, rows: Branches, scale: float,
              relu: bool = True) -> KerasTensor:
    """Figures 10, 11 and 13 of [1]: `relu(x + scale * up(concat(branches)))`."""
    mixed = branches(STYLE, x, scope, rows)
    up = STYLE.conv(mixed, f"{scope}/Conv2d_1x1", x.shape[-1], 1, norm=False, relu=False)
    if scale != 1.0:
        up = layers.Rescaling(scale, name=dotted(f"{scope}/scale"))(up)
    x = layers.Add(name=dotted(f"{scope}/add"))([x, up])
    return layers.ReLU(name=dotted(f"{scope}/Relu"))(x) if relu else x
