"""TensorFlow is loaded once, quietly, for every test that needs it; models are dropped after each module."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from export.quiet import load_tensorflow

settings.register_profile("suite", deadline=None)  # a busy machine is no finding
settings.load_profile("suite")

# a shell's background job ignores Ctrl-C, and what it starts does so too
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked gpu is skipped, with the reason, where there is none."""
    from engines.errors import RuntimeUnavailable
    from engines.machine import gpu

    try:
        gpu("cuda:0")
    except RuntimeUnavailable as error:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture(scope="session", autouse=True)
def tensorflow() -> None:
    load_tensorflow()


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    yield
    import keras

    keras.backend.clear_session()
