"""TensorFlow is loaded once, quietly, for every test that needs it; models are dropped after each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from export.quiet import load_tensorflow


@pytest.fixture(scope="session", autouse=True)
def tensorflow() -> None:
    load_tensorflow()


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    yield
    import keras

    keras.backend.clear_session()
