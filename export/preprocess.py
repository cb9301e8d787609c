"""Normalisations that turn uint8 RGB pixels into what a network was trained on.

    y[c] = x[order[c]] * scale[c] + offset[c]        x in 0..255

Sources: keras.applications.imagenet_utils (tf, caffe, torch), TF-Slim preprocessing/vgg_preprocessing.py (rgb_mean),
facenet's `fixed_image_standardization` (facenet).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from export.errors import UsageError

RGB_MEAN = (123.68, 116.779, 103.939)
TORCH_MEAN, TORCH_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normalisation:
    """`bgr` says that the network's channels stand in reverse."""

    scale: tuple[float, float, float]
    offset: tuple[float, float, float]
    bgr: bool = False


NORMALISATIONS: Mapping[str, Normalisation] = MappingProxyType({
    "tf": Normalisation((1 / 127.5,) * 3, (-1.0,) * 3),
    "caffe": Normalisation((1.0,) * 3, (-RGB_MEAN[2], -RGB_MEAN[1], -RGB_MEAN[0]), bgr=True),
    "torch": Normalisation((1 / 255 / TORCH_STD[0], 1 / 255 / TORCH_STD[1], 1 / 255 / TORCH_STD[2]),
                           (-TORCH_MEAN[0] / TORCH_STD[0], -TORCH_MEAN[1] / TORCH_STD[1],
                            -TORCH_MEAN[2] / TORCH_STD[2])),
    "rgb_mean": Normalisation((1.0,) * 3, (-RGB_MEAN[0], -RGB_MEAN[1], -RGB_MEAN[2])),
    "facenet": Normalisation((1 / 128,) * 3, (-127.5 / 128,) * 3),
})
CHOICES = ("none", "own", *NORMALISATIONS)


def resolve(choice: str, own: str | None) -> str | None:
    """The name of a normalisation, None for `none`. `own` is the one that the catalog gives the network."""
    if choice not in CHOICES:
        raise UsageError(f"preprocess {choice!r}", "unknown", f"one of {', '.join(CHOICES)}")
    if choice == "own" and own is None:
        raise UsageError("preprocess own", "only a network of the catalog has its own", f"one of {', '.join(CHOICES)}")
    return None if choice == "none" else own if choice == "own" else choice


def apply(name: str | None, pixels: np.ndarray) -> np.ndarray:
    """(batch, height, width, 3) uint8 -> float32 of the same shape; with `name` None the input as it is."""
    if name is None:
        return pixels
    normalisation = NORMALISATIONS[name]
    x = pixels.astype(np.float64)[..., ::-1 if normalisation.bgr else 1]
    return (x * normalisation.scale + normalisation.offset).astype(np.float32)
