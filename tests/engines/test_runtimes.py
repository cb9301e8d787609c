"""Every runtime that can run here: the same numbers, both ways to run, and one line for feeds that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.errors import BuildError, EngineError, FeedError, RuntimeUnavailable, StaleEngine
from engines.runtime import BuildRequest, Options, Profile, Runtime, backend
from tests.engines.models import convolution, expected, images

HERE = ("onnxruntime", "openvino")


def engine(runtime: str, folder: Path, **changes: object) -> Runtime:
    model = convolution(folder / "m.onnx")
    request = BuildRequest(model, runtime, **changes)  # type: ignore[arg-type]
    target = folder / f"e{backend(runtime).SUFFIX}"
    backend(runtime).build(request, target, lambda step: None)
    return backend(runtime).load(request, target)


@pytest.mark.parametrize("runtime", HERE)
def test_numbers_of_both_ways_to_run(runtime: str, tmp_path: Path) -> None:
    with engine(runtime, tmp_path) as loaded:
        assert [(s.name, s.dtype, s.shape) for s in loaded.inputs] == [("images", np.float32, (None, 3, 8, 8))]
        assert [s.name for s in loaded.outputs] == ["scores"]
        for batch in (1, 5, 2):
            feeds = images(batch, batch)
            np.testing.assert_allclose(loaded.run(feeds)["scores"], expected(tmp_path / "m.onnx", feeds), rtol=1e-4,
                                       atol=1e-6)
        prepared = loaded.prepare(images(4))
        result = prepared.outputs["scores"]
        for seed in (0, 1):
            feeds = images(4, seed)
            prepared.inputs["images"][...] = feeds["images"]
            prepared()
            assert prepared.outputs["scores"] is result
            np.testing.assert_allclose(result, expected(tmp_path / "m.onnx", feeds), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("runtime", HERE)
def test_results_of_a_run_are_the_callers(runtime: str, tmp_path: Path) -> None:
    with engine(runtime, tmp_path) as loaded:
        first = loaded.run(images(1))["scores"]
        kept = first.copy()
        loaded.run(images(1, 7))
        assert np.array_equal(first, kept)


FEEDS: dict[str, tuple[Callable[[], dict[str, np.ndarray]], str]] = {
    "name": (lambda: {"pixels": images(1)["images"]}, "feeds: pixels; expected images"),
    "none": (dict, "feeds: none; expected images"),
    "more": (lambda: images(1) | {"other": np.zeros(1)}, "feeds: images, other; expected images"),
    "type": (lambda: {"images": images(1)["images"].astype(np.float64)}, "feed images: type float64; expected float32"),
    "rank": (lambda: {"images": images(1)["images"][0]}, "feed images: shape 3x8x8; expected Nx3x8x8"),
    "size": (lambda: {"images": np.zeros((1, 3, 8, 9), np.float32)}, "shape 1x3x8x9; expected Nx3x8x8"),
    "scalar": (lambda: {"images": np.zeros((), np.float32)}, "shape of a scalar"),
    "empty": (lambda: {"images": np.zeros((0, 3, 8, 8), np.float32)}, "no elements"),
}


@pytest.mark.parametrize("runtime", HERE)
@pytest.mark.parametrize("kind", FEEDS)
def test_feeds_that_do_not_fit(kind: str, runtime: str, tmp_path: Path) -> None:
    feeds, text = FEEDS[kind]
    with engine(runtime, tmp_path) as loaded:
        for run in (loaded.run, loaded.prepare):
            with pytest.raises(FeedError, match=text):
                run(feeds())


def test_feeds_outside_of_the_profiles() -> None:
    from engines.runtime import TensorSpec, check_feeds

    specs = (TensorSpec("a", np.dtype(np.float32), (None, 2)), TensorSpec("b", np.dtype(np.float32), (None,)))
    fed = {"a": np.zeros((4, 2), np.float32), "b": np.zeros(4, np.float32)}
    profiles = (Profile(1, 1, 2), Profile(8, 8, 16))
    check_feeds(specs, fed)
    with pytest.raises(FeedError, match="batch 4; expected 1 to 2 or 8 to 16"):
        check_feeds(specs, fed, profiles)
    with pytest.raises(FeedError, match="batch sizes 3, 4; expected the same for every input"):
        check_feeds(specs, fed | {"b": np.zeros(3, np.float32)})


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 8, 4), (0, 1, 1)])
def test_profile_out_of_order(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(BuildError, match="expected 1 <= min <= opt <= max"):
        Profile(*sizes)


def test_openvino_computes_in_the_precision_it_is_told(tmp_path: Path) -> None:
    request = BuildRequest(convolution(tmp_path / "m.onnx"), "openvino", "fp32")
    built = backend("openvino").build(request, tmp_path / "e", lambda step: None)
    assert set(built.layers) == {"fp32"}


def test_fp16_on_a_cpu_without_it_is_seen_in_the_optimized_graph(tmp_path: Path) -> None:
    from export.precision import to_half

    to_half(convolution(tmp_path / "m.onnx"), tmp_path / "h.onnx", "fp16")
    half = {w.data_type for w in onnx.load(tmp_path / "h.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in half
    request = BuildRequest(tmp_path / "h.onnx", "onnxruntime", "fp16")
    built = backend("onnxruntime").build(request, tmp_path / "e.onnx", lambda step: None)
    assert sum(built.layers.values()) == 2
    computed = {n.op_type for n in onnx.load(tmp_path / "e.onnx").graph.node}
    assert ("Cast" in computed) == ("fp32" in built.layers)


@pytest.mark.parametrize("runtime", HERE)
@pytest.mark.parametrize("data", [b"", b"no model", bytes(1000)])
def test_bytes_that_are_no_model(runtime: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(EngineError) as caught:
        backend(runtime).build(BuildRequest(path, runtime), tmp_path / "e", lambda step: None)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "e.blob"
    path.write_bytes(b"not an engine" * 50)
    with pytest.raises(StaleEngine, match="OpenVINO does not load it"):
        backend("openvino").load(BuildRequest(path, "openvino"), path)


def test_runtime_and_device_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="runtime 'tensorflow-lite': unknown; expected one of onnxruntime"):
        backend("tensorflow-lite")
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(RuntimeUnavailable):
            backend(runtime).identity(BuildRequest(tmp_path, runtime, device="cuda:99"))


def test_threads_are_an_option(tmp_path: Path) -> None:
    for runtime in HERE:
        (tmp_path / runtime).mkdir()
        with engine(runtime, tmp_path / runtime, options=Options(threads=1)) as loaded:
            assert loaded.run(images(1))["scores"].shape == (1, 5)


def test_graph_optimization_is_an_option(tmp_path: Path) -> None:
    model, found = convolution(tmp_path / "m.onnx"), {}
    for level in ("extended", "none"):
        request = BuildRequest(model, "onnxruntime", options=Options(graph=level))
        backend("onnxruntime").build(request, tmp_path / "e.onnx", lambda step: None)
        found[level] = [n.op_type for n in onnx.load(tmp_path / "e.onnx").graph.node]
    assert found["none"] == [n.op_type for n in onnx.load(model).graph.node]
    assert "FusedConv" in found["extended"]
    with pytest.raises(BuildError, match="graph optimization 'most': unknown; expected one of all, extended"):
        backend("onnxruntime").build(BuildRequest(model, "onnxruntime", options=Options(graph="most")), tmp_path / "e",
                                     lambda step: None)


@pytest.mark.parametrize("runtime", ["onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"])
def test_providers_of_a_gpu_say_what_is_missing(runtime: str, tmp_path: Path) -> None:
    request = BuildRequest(convolution(tmp_path / "m.onnx"), runtime)
    with pytest.raises(RuntimeUnavailable, match=f"{runtime} on cpu: runs on a GPU only; expected --device cuda:0"):
        backend(runtime).identity(request)
    with pytest.raises(RuntimeUnavailable, match=r"pip install|driver"):
        backend(runtime).identity(replace(request, device="cuda:99"))
