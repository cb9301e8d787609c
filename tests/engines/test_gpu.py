"""What needs an NVIDIA GPU: engines that are built, loaded and run on one. `make test-gpu` runs this file alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.errors import FeedError, StaleEngine
from engines.runtime import BuildRequest, Options, Profile, Runtime, backend
from export.precision import to_half, to_int8
from tests.engines.models import convolution, expected, images

pytestmark = pytest.mark.gpu
TENSORRT = ("tensorrt", "tensorrt-rtx")
LIMITS = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1}


def model_for(precision: str, folder: Path) -> Path:
    model = convolution(folder / "m.onnx")
    if precision in ("fp16", "bf16"):
        to_half(model, folder / "v.onnx", precision)
    elif precision == "int8":
        to_int8(model, folder / "v.onnx", "int8-symmetric", images(16, 1))
    else:
        return model
    return folder / "v.onnx"


def engine(runtime: str, folder: Path, precision: str = "fp32", profiles: tuple[Profile, ...] = (Profile(1, 2, 8),),
           **options: object) -> Runtime:
    request = BuildRequest(model_for(precision, folder), runtime, precision, "cuda:0", profiles,
                           Options(**options))  # type: ignore[arg-type]
    target = folder / f"e{backend(runtime).SUFFIX}"
    backend(runtime).build(request, target, lambda step: None)
    return backend(runtime).load(request, target)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("runtime", TENSORRT)
def test_numbers(runtime: str, precision: str, tmp_path: Path) -> None:
    with engine(runtime, tmp_path, precision) as loaded:
        for batch in (1, 8, 3):
            feeds = images(batch, batch)
            found, truth = loaded.run(feeds)["scores"], expected(tmp_path / "m.onnx", feeds)
            assert np.linalg.norm(found - truth) / np.linalg.norm(truth) < LIMITS[precision]


@pytest.mark.parametrize("runtime", TENSORRT)
def test_prepared_runs_are_timed_in_three_parts(runtime: str, tmp_path: Path) -> None:
    with engine(runtime, tmp_path) as loaded:
        prepared = loaded.prepare(images(4))
        for seed in (0, 1):
            prepared.inputs["images"][...] = images(4, seed)["images"]
            prepared()
            np.testing.assert_allclose(prepared.outputs["scores"], expected(tmp_path / "m.onnx", images(4, seed)),
                                       rtol=1e-4, atol=1e-5)
        times = prepared.times_ms  # type: ignore[attr-defined]
        assert len(times) == 3
        assert all(t >= 0 for t in times)
        assert sum(times) > 0


@pytest.mark.parametrize("runtime", TENSORRT)
def test_several_profiles_and_a_batch_outside_of_them(runtime: str, tmp_path: Path) -> None:
    with engine(runtime, tmp_path, profiles=(Profile(1, 1, 1), Profile(4, 8, 16))) as loaded:
        for batch in (1, 4, 16):
            np.testing.assert_allclose(loaded.run(images(batch))["scores"],
                                       expected(tmp_path / "m.onnx", images(batch)), rtol=1e-4, atol=1e-5)
        with pytest.raises(FeedError, match="batch 2; expected 1 to 1 or 4 to 16"):
            loaded.run(images(2))


@pytest.mark.parametrize("runtime", TENSORRT)
def test_stripped_plan_is_refitted(runtime: str, tmp_path: Path) -> None:
    with engine(runtime, tmp_path, strip_weights=True) as loaded:
        np.testing.assert_allclose(loaded.run(images(2))["scores"], expected(tmp_path / "m.onnx", images(2)),
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("runtime", TENSORRT)
def test_bytes_that_are_no_plan(runtime: str, tmp_path: Path) -> None:
    path = tmp_path / "e.plan"
    path.write_bytes(b"not a plan" * 100)
    with pytest.raises(StaleEngine, match="does not load it"):
        backend(runtime).load(BuildRequest(convolution(tmp_path / "m.onnx"), runtime, device="cuda:0"), path)


def test_onnxruntime_on_cuda(tmp_path: Path) -> None:
    with engine("onnxruntime", tmp_path) as loaded:
        np.testing.assert_allclose(loaded.run(images(4))["scores"], expected(tmp_path / "m.onnx", images(4)),
                                   rtol=1e-3, atol=1e-4)
