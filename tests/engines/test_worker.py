"""One runtime in one process: results come back, errors come back as they are, and a process that dies is told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from engines.errors import EngineError
from engines.runtime import BuildRequest
from engines.worker import Worker
from tests.engines.models import convolution, expected, images


def test_worker(tmp_path: Path) -> None:
    model = convolution(tmp_path / "m.onnx")
    with Worker(BuildRequest(model, "onnxruntime")) as worker:
        assert worker.build().layers == {"fp32": 2}
        found = worker.prepare(images(3))["scores"]
        np.testing.assert_allclose(found, expected(model, images(3)), rtol=1e-4, atol=1e-6)
        samples = worker.time(5).wall
        assert len(samples) == 5
        assert all(n > 0 for n in samples)
        assert worker.peak_bytes() > 10e6
        with pytest.raises(EngineError, match="feeds: none; expected images") as caught:
            worker.prepare({})
        assert caught.value.exit_code == 1
        assert worker.prepare(images(1))["scores"].shape == (1, 5)
        pid = worker.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_peak_memory_is_not_the_parents(tmp_path: Path) -> None:
    ballast = np.ones(1 << 30, np.uint8)
    with Worker(BuildRequest(convolution(tmp_path / "m.onnx"), "onnxruntime")) as worker:
        worker.build()
        assert worker.peak_bytes() < ballast.nbytes


def test_worker_that_dies(tmp_path: Path) -> None:
    with Worker(BuildRequest(convolution(tmp_path / "m.onnx"), "onnxruntime")) as worker:
        worker.build()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="onnxruntime process: ended with -9 in prepare"):
            worker.prepare(images(1))


def test_worker_with_a_model_that_is_not_there(tmp_path: Path) -> None:
    with Worker(BuildRequest(tmp_path / "no.onnx", "onnxruntime")) as worker, pytest.raises(EngineError) as caught:
        worker.build()
    assert "\n" not in str(caught.value)
