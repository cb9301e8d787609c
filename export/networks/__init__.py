"""The classic networks as Keras functional models. `build` is the way in."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from export.catalog import NetworkConfig

if TYPE_CHECKING:
    import keras


def build(config: NetworkConfig) -> keras.Model:
    """The network of `config`: `images` (batch, height, width, 3) -> dict of end point name -> tensor."""
    family = importlib.import_module(f"export.networks.{config.spec.family}")
    model: keras.Model = family.build(config)
    return model
