"""ResNet v2: residual units with pre-activation.

[1] He et al., "Identity Mappings in Deep Residual Networks", arXiv:1603.05027
[2] TF-Slim, nets/resnet_v2.py and resnet_utils.py: the stride stands in the last unit of a block, the max pool
    pads SAME, a shortcut without a change of width is a 1x1 max pool, and `output_stride` trades strides for
    dilation [3].
[3] Chen et al., "DeepLab", arXiv:1606.00915
"""

from __future__ import annotations

from typing import Any

import keras
from keras import KerasTensor, layers

from export.catalog import NetworkConfig
from export.networks.layers import ConvStyle, dotted, finish, global_mean, image_input, softmax, squeeze

STYLE = ConvStyle(1e-4, lambda: keras.initializers.VarianceScaling(2.0), momentum=0.997, epsilon=1e-5)
# block -> (width inside a unit, stride of its last unit)
BLOCKS = {"block1": (64, 2), "block2": (128, 2), "block3": (256, 2), "block4": (512, 1)}


def build(config: NetworkConfig) -> keras.Model:
    """(batch, height, width, 3) -> `logits` (batch, classes), or (batch, h, w, classes) without global_pool."""
    options, scope, units = config.options, config.spec.scope, dict(config.spec.row)
    unit, kind = (_bottleneck, "bottleneck_v2") if units["bottleneck"] else (_basic, "basic_v2")
    images = x = image_input(config.size)
    ends: dict[str, KerasTensor] = {}
    stride_left, rate = options["output_stride"] or 32, 1
    if options["include_root_block"]:
        ends["conv1"] = x = _strided(x, f"{scope}/conv1", 64, 7, 2, bias=True, norm=False, relu=False)
        x = layers.MaxPooling2D(3, 2, "same", name=f"{scope}.pool1")(x)
        stride_left //= 4
    for block, (width, block_stride) in BLOCKS.items():
        for index in range(1, units[block] + 1):
            stride = block_stride if index == units[block] else 1
            taken = min(stride, stride_left)  # past the wished output stride, a stride becomes a dilation
            name = f"{block}/unit_{index}/{kind}"
            ends[name] = x = unit(x, f"{scope}/{name}", width, taken, rate)
            stride_left, rate = stride_left // taken, rate * stride // taken
        ends[block] = x
    x = layers.ReLU(name=f"{scope}.postnorm.Relu")(STYLE.norm(x, f"{scope}/postnorm"))
    if options["global_pool"]:
        ends["global_pool"] = x = global_mean(x, f"{scope}.pool5")
    x = STYLE.conv(x, f"{scope}/logits", config.classes, 1, norm=False, relu=False)
    ends["logits"] = squeeze(x, "logits") if options["global_pool"] else x
    ends["predictions"] = softmax(ends["logits"])
    return finish(config.name, images, ends)


def _bottleneck(x: KerasTensor, scope: str, width: int, stride: int, rate: int) -> KerasTensor:
    """1x1 down to `width`, 3x3, 1x1 up to 4 `width`; figure 4(e) of [1]."""
    preact, shortcut = _preact(x, scope, 4 * width, stride)
    y = STYLE.conv(preact, f"{scope}/conv1", width, 1)
    y = _strided(y, f"{scope}/conv2", width, 3, stride, rate)
    y = STYLE.conv(y, f"{scope}/conv3", 4 * width, 1, norm=False, relu=False)
    return layers.Add(name=dotted(f"{scope}/add"))([shortcut, y])


def _basic(x: KerasTensor, scope: str, width: int, stride: int, rate: int) -> KerasTensor:
    """Two 3x3; the unit of the 18- and 34-layer networks, with TF-Slim's rules for names, stride and bias."""
    preact, shortcut = _preact(x, scope, width, stride)
    y = _strided(preact, f"{scope}/conv1", width, 3, stride, rate)
    y = STYLE.conv(y, f"{scope}/conv2", width, 3, rate=rate, norm=False, relu=False)
    return layers.Add(name=dotted(f"{scope}/add"))([shortcut, y])


def _preact(x: KerasTensor, scope: str, channels: int, stride: int) -> tuple[KerasTensor, KerasTensor]:
    preact = STYLE.norm(x, f"{scope}/preact")
    preact = layers.ReLU(name=dotted(f"{scope}/preact/Relu"))(preact)
    if x.shape[-1] != channels:
        return preact, STYLE.conv(preact, f"{scope}/shortcut", channels, 1, stride, norm=False, relu=False)
    if stride == 1:
        return preact, x
    return preact, layers.MaxPooling2D(1, stride, name=dotted(f"{scope}/shortcut"))(x)


def _strided(x: KerasTensor, scope: str, channels: int, kernel: int, stride: int, rate: int = 1,
             **kwargs: Any) -> KerasTensor:
    """`conv2d_same` of [2]: with a stride, pads alike on both sides, where SAME depends on the input's size."""
    if stride == 1:
        return STYLE.conv(x, scope, channels, kernel, rate=rate, **kwargs)
    total = rate * (kernel - 1)
    pad = (total // 2, total - total // 2)
    x = layers.ZeroPadding2D((pad, pad), name=dotted(f"{scope}/pad"))(x)
    return STYLE.conv(x, scope, channels, kernel, stride, "valid", rate, **kwargs)
