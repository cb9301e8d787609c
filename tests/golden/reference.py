"""Outputs of the original networks, and the weights and inputs that they were computed from.

Each `<case>.npz` was made by running TF-Slim's own networks (facenet's for inception_resnet_v1, the TensorFlow
tutorial's for alexnet) in graph mode on TensorFlow 2.12. It holds `logits` (batch 2), `variable_names` and
`variable_shapes` of the original graph, and for inner end points `stats/<name>` (mean, standard deviation, minimum,
maximum) and `shape/<name>` (NHWC). Weights and inputs are functions of names alone, in plain NumPy.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from export import catalog
from export.weights import Variables

FOLDER = Path(__file__).parent


def named_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the original's variable `name`, float32."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    leaf = name.rsplit("/", 1)[-1]
    if leaf == "moving_variance":
        value = rng.uniform(0.5, 1.5, shape)
    elif leaf == "gamma":
        value = rng.uniform(0.8, 1.2, shape)
    elif leaf in ("beta", "moving_mean", "biases"):
        value = rng.normal(0.0, 0.1, shape)
    else:
        value = rng.normal(0.0, np.sqrt(1.5 / int(np.prod(shape[:-1]))), shape)
        if name.endswith("bottleneck_v2/conv3/weights"):
            value *= 0.25
    return value.astype(np.float32)


def named_input(case: str, shape: tuple[int, ...]) -> np.ndarray:
    """The image batch of `case`: NHWC, float32, in [-1, 1): 8x8 patches and noise."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(("input:" + case).encode())))
    batch, height, width, channels = shape
    patches = rng.uniform(-0.75, 0.75, (batch, 8, 8, channels))
    rows, columns = (np.arange(n) * 8 // n for n in (height, width))
    noise = rng.uniform(-0.25, 0.25, shape)
    return (patches[:, rows][:, :, columns] + noise).astype(np.float32)


def summary(value: np.ndarray) -> np.ndarray:
    """Mean, standard deviation, minimum and maximum."""
    value = value.astype(np.float64)
    return np.array([value.mean(), value.std(), value.min(), value.max()])


@dataclass(frozen=True)
class Case:
    name: str
    network: str
    size: int
    classes: int | None
    options: tuple[tuple[str, str], ...] = ()

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(FOLDER / f"{self.name}.npz") as file:
            return dict(file)

    @property
    def config(self) -> catalog.NetworkConfig:
        return catalog.configure(self.network, (self.size, self.size), self.classes, dict(self.options))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every variable of the original graph."""
        names, shapes = self.arrays["variable_names"], self.arrays["variable_shapes"]
        return {str(n): tuple(map(int, s.split(","))) for n, s in zip(names, shapes, strict=True)}

    @property
    def variables(self) -> Variables:
        return Variables(self.name, self.shapes, lambda name: named_weight(name, self.shapes[name]))

    @property
    def images(self) -> np.ndarray:
        return named_input(self.name, (2, self.size, self.size, 3))

    @property
    def stats(self) -> dict[str, np.ndarray]:
        return {key[6:]: value for key, value in self.arrays.items() if key.startswith("stats/")}


CASES = {case.name: case for case in (
    Case("alexnet", "alexnet", 224, 1000),
    Case("alexnet_no_lrn", "alexnet", 224, 1000, (("lrn", "false"),)),
    Case("vgg_11", "vgg_11", 224, 1000),
    Case("vgg_16", "vgg_16", 224, 1000),
    Case("inception_v3", "inception_v3", 299, 1001),
    Case("resnet_v2_50", "resnet_v2_50", 224, 1001),
    Case("resnet_v2_152", "resnet_v2_152", 224, 1001),
    Case("resnet_v2_50_dense_stride16", "resnet_v2_50", 321, 21,
         (("global_pool", "false"), ("output_stride", "16"))),
    Case("inception_resnet_v1", "inception_resnet_v1", 160, None),
)}
