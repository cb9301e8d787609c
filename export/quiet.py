"""TensorFlow without its start-up log, which its C++ side writes to file descriptor 2 before any setting applies."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def load_tensorflow() -> None:
    """Imports TensorFlow and Keras for an export: on the CPU, where float32 is float32, and silently.

    Does nothing in a process that has imported TensorFlow already.
    """
    if "tensorflow" in sys.modules:
        return
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    with _silent_stderr():
        import keras  # noqa: F401
        import tensorflow as tf

        tf.zeros(())  # the first operation starts the runtime, which logs too
    tf.get_logger().setLevel("ERROR")  # Keras retraces a grouped convolution, and TensorFlow warns the user of it


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """File descriptor 2 to nowhere; a Python exception still propagates."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
