"""Inception V3.

[1] Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv:1512.00567
[2] TF-Slim, nets/inception_v3.py: names, channels, and the auxiliary head on Mixed_6e. Its scope names are kept
    as published, irregular ones too (`Conv_1_0c_5x5` in Mixed_5c, `Conv2d_1a_1x1` for a 3x3 in Mixed_6a).
"""

from __future__ import annotations

import keras
from keras import KerasTensor, layers

from export.catalog import NetworkConfig
from export.networks.layers import (
    Branches,
    ConvStyle,
    branches,
    chain,
    dotted,
    finish,
    global_mean,
    image_input,
    join,
    reduction,
    softmax,
    squeeze,
    stem,
)

STYLE = ConvStyle(4e-5, lambda: keras.initializers.VarianceScaling(2.0), momentum=0.9997, scale=False)

STEM = (("Conv2d_1a_3x3", 32, 3, 2, "valid"), ("Conv2d_2a_3x3", 32, 3, 1, "valid"),
        ("Conv2d_2b_3x3", 64, 3, 1, "same"), ("MaxPool_3a_3x3",),
        ("Conv2d_3b_1x1", 80, 1, 1, "valid"), ("Conv2d_4a_3x3", 192, 3, 1, "valid"), ("MaxPool_5a_3x3",))


def _mixed_5(pool: int, b1: tuple[str, str]) -> Branches:
    return ((("Conv2d_0a_1x1", 64, 1),),
            ((b1[0], 48, 1), (b1[1], 64, 5)),
            (("Conv2d_0a_1x1", 64, 1), ("Conv2d_0b_3x3", 96, 3), ("Conv2d_0c_3x3", 96, 3)),
            (("AvgPool_0a_3x3", 0, 3), ("Conv2d_0b_1x1", pool, 1)))


def _mixed_6(width: int) -> Branches:
    return ((("Conv2d_0a_1x1", 192, 1),),
            (("Conv2d_0a_1x1", width, 1), ("Conv2d_0b_1x7", width, (1, 7)), ("Conv2d_0c_7x1", 192, (7, 1))),
            (("Conv2d_0a_1x1", width, 1), ("Conv2d_0b_7x1", width, (7, 1)), ("Conv2d_0c_1x7", width, (1, 7)),
             ("Conv2d_0d_7x1", width, (7, 1)), ("Conv2d_0e_1x7", 192, (1, 7))),
            (("AvgPool_0a_3x3", 0, 3), ("Conv2d_0b_1x1", 192, 1)))


# branches side by side
BRANCHES = {
    "Mixed_5b": _mixed_5(32, ("Conv2d_0a_1x1", "Conv2d_0b_5x5")),
    "Mixed_5c": _mixed_5(64, ("Conv2d_0b_1x1", "Conv_1_0c_5x5")),
    "Mixed_5d": _mixed_5(64, ("Conv2d_0a_1x1", "Conv2d_0b_5x5")),
    "Mixed_6b": _mixed_6(128), "Mixed_6c": _mixed_6(160), "Mixed_6d": _mixed_6(160), "Mixed_6e": _mixed_6(192),
}
# branches whose last convolution is 3x3/2 VALID; a 3x3/2 max pool joins them.
REDUCTIONS: dict[str, Branches] = {
    "Mixed_6a": ((("Conv2d_1a_1x1", 384, 3),),
                 (("Conv2d_0a_1x1", 64, 1), ("Conv2d_0b_3x3", 96, 3), ("Conv2d_1a_1x1", 96, 3))),
    "Mixed_7a": ((("Conv2d_0a_1x1", 192, 1), ("Conv2d_1a_3x3", 320, 3)),
                 (("Conv2d_0a_1x1", 192, 1), ("Conv2d_0b_1x7", 192, (1, 7)), ("Conv2d_0c_7x1", 192, (7, 1)),
                  ("Conv2d_1a_3x3", 192, 3))),
}
# name of the 3x1 convolution in Branch_1
EXPANDED = {"Mixed_7b": "Conv2d_0b_3x1", "Mixed_7c": "Conv2d_0c_3x1"}
ORDER = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
         "Mixed_7a", "Mixed_7b", "Mixed_7c")


def build(config: NetworkConfig) -> keras.Model:
    """(batch, height, width, 3) -> `logits` (batch, classes), or `Mixed_7c` without the top."""
    scope, options = config.spec.scope, config.options
    images = x = image_input(config.size)
    ends: dict[str, KerasTensor] = {}
    x = stem(STYLE, x, scope, STEM, ends)
    for name in ORDER:
        ends[name] = x = _mixed(x, f"{scope}/{name}", name)
        if name == "Mixed_6e" and options["include_top"] and options["aux_logits"]:
            ends["AuxLogits"] = _aux(x, f"{scope}/AuxLogits", config.classes)
    if options["include_top"]:
        # TF-Slim pools 8x8 at 299x299; the mean over the whole map is the same and fits every size
        ends["PreLogits"] = x = global_mean(x, f"{scope}.AvgPool_1a")
        x = layers.Dropout(0.2, name=f"{scope}.Dropout_1b")(x)
        x = STYLE.conv(x, f"{scope}/Logits/Conv2d_1c_1x1", config.classes, 1, norm=False, relu=False)
        ends["logits"] = squeeze(x, "logits")
        ends["predictions"] = softmax(ends["logits"])
    return finish(config.name, images, ends)


def _mixed(x: KerasTensor, scope: str, name: str) -> KerasTensor:
    """Figures 5 and 6 of [1]; figure 10 halves height and width; figure 7 expands the coarsest maps."""
    if name in BRANCHES:
        return branches(STYLE, x, scope, BRANCHES[name])
    if name in REDUCTIONS:
        return reduction(STYLE, x, scope, REDUCTIONS[name])
    return _expanded(x, scope, name)


def _expanded(x: KerasTensor, scope: str, name: str) -> KerasTensor:
    """Figure 7 of [1]: the last convolution of two branches is a 1x3 beside a 3x1."""
    b0 = chain(STYLE, x, f"{scope}/Branch_0", (("Conv2d_0a_1x1", 320, 1),))
    b1 = chain(STYLE, x, f"{scope}/Branch_1", (("Conv2d_0a_1x1", 384, 1),))
    b1 = [STYLE.conv(b1, f"{scope}/Branch_1/Conv2d_0b_1x3", 384, (1, 3)),
          STYLE.conv(b1, f"{scope}/Branch_1/{EXPANDED[name]}", 384, (3, 1))]
    b2 = chain(STYLE, x, f"{scope}/Branch_2", (("Conv2d_0a_1x1", 448, 1), ("Conv2d_0b_3x3", 384, 3)))
    b2 = [STYLE.conv(b2, f"{scope}/Branch_2/Conv2d_0c_1x3", 384, (1, 3)),
          STYLE.conv(b2, f"{scope}/Branch_2/Conv2d_0d_3x1", 384, (3, 1))]
    b3 = chain(STYLE, x, f"{scope}/Branch_3", (("AvgPool_0a_3x3", 0, 3), ("Conv2d_0b_1x1", 192, 1)))
    return join([b0, join(b1, f"{scope}/Branch_1"), join(b2, f"{scope}/Branch_2"), b3], scope)


def _aux(x: KerasTensor, scope: str, classes: int | None) -> KerasTensor:
    """The auxiliary classifier of section 4 of [1]; its 5x5 shrinks with a small map, as in [2]."""
    x = layers.AveragePooling2D(5, 3, name=dotted(f"{scope}/AvgPool_1a_5x5"))(x)
    x = STYLE.conv(x, f"{scope}/Conv2d_1b_1x1", 128, 1)
    kernel = tuple(min(5, n) for n in x.shape[1:3])
    x = STYLE.conv(x, f"{scope}/Conv2d_2a_5x5", 768, kernel, padding="valid")
    x = STYLE.conv(x, f"{scope}/Conv2d_2b_1x1", classes, 1, norm=False, relu=False)
    return squeeze(x, "AuxLogits") if x.shape[1:3] == (1, 1) else x
