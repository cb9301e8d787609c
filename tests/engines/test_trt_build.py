"""TensorRT-RTX builds for real, with no GPU: profiles, targets, precisions, and reasons for what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from engines import model_file
from engines.errors import BuildError, RuntimeUnavailable
from engines.runtime import BuildRequest, Built, Options, Profile, backend
from engines.trt_build import inspected
from export.precision import to_half, to_int8
from tests.engines.models import convolution, images

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 has no wheel for this platform")


def build(model: Path, precision: str = "fp32", profiles: tuple[Profile, ...] = (Profile(1, 2, 4),),
          **options: object) -> tuple[Built, bytes]:
    target = model.parent / "e.plan"
    request = BuildRequest(model, "tensorrt-rtx", precision, profiles=profiles,
                           options=Options(**options))  # type: ignore[arg-type]
    built = backend("tensorrt-rtx").build(request, target, lambda step: None)
    return built, target.read_bytes()


def test_precision_is_read_from_the_network(tmp_path: Path) -> None:
    model = convolution(tmp_path / "m.onnx")
    for precision in ("fp16", "bf16"):
        to_half(model, tmp_path / f"{precision}.onnx", precision)
        assert build(tmp_path / f"{precision}.onnx", precision)[0].layers == {precision: 2}
    to_int8(model, tmp_path / "i.onnx", "int8-symmetric", images(4))
    assert build(tmp_path / "i.onnx", "int8")[0].layers == {"int8": 2}
    assert build(model)[0].layers == {"fp32": 2}
    assert build(model)[0].tf32 is False
    tf32, _ = build(model, "tf32")
    assert (tf32.layers, tf32.tf32) == ({"tf32": 2}, True)
    # a file in float32 is not called fp16 because somebody asks for it
    assert build(model, "fp16")[0].layers == {"fp32": 2}


def test_uint8_activations_are_refused_with_the_node(tmp_path: Path) -> None:
    to_int8(convolution(tmp_path / "m.onnx"), tmp_path / "u.onnx", "int8", images(4))
    with pytest.raises(BuildError, match=r"tensorrt-rtx, u\.onnx: node .*DequantizeLinear"):
        build(tmp_path / "u.onnx", "int8")


def test_profiles_and_targets(tmp_path: Path) -> None:
    model = convolution(tmp_path / "m.onnx")
    one = build(model)[1]
    assert len(build(model, profiles=(Profile(1, 1, 1), Profile(2, 8, 32)))[1]) > len(one)
    assert build(model, compute_capabilities=("86", "120"))[1] != one
    with pytest.raises(BuildError, match=r"compute capability '13': unknown; expected .*86"):
        build(model, compute_capabilities=("13",))
    assert build(convolution(tmp_path / "fixed.onnx", batch=3), profiles=(Profile(3, 3, 3),))[0].layers


@pytest.mark.parametrize(("batch", "first"), [(None, "batch"), (3, 3)])
def test_a_build_says_what_the_plan_takes_and_gives(batch: int | None, first: str | int, tmp_path: Path) -> None:
    source = convolution(tmp_path / "m.onnx", batch=batch)
    specs = model_file.read(source)
    details = build(source, profiles=(Profile(batch or 1, batch or 1, batch or 1),))[0].details
    for kind, found in (("inputs", specs.inputs), ("outputs", specs.outputs)):
        assert details[kind] == [
            {"name": s.name, "dtype": "float32", "shape": [first, *s.shape[1:]]} for s in found]


@pytest.mark.parametrize("options", [{"optimization_level": 1}, {"workspace_bytes": 64 << 20}])
def test_options_build(options: dict[str, object], tmp_path: Path) -> None:
    assert build(convolution(tmp_path / "m.onnx", channels=256), **options)[1]


def test_version_compatible_needs_the_lean_runtime(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="libnvinfer_lean"):  # which TensorRT has and TensorRT-RTX has not
        build(convolution(tmp_path / "m.onnx"), version_compatible=True)


def test_plan_without_weights_is_built_on_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"without weights: .*expected a GPU while building; build with --device cuda"):
        build(convolution(tmp_path / "m.onnx"), strip_weights=True)


def test_an_operation_that_the_parser_lacks(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("StringNormalizer", ["x"], ["y"], "odd")], "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "s.onnx")
    with pytest.raises(BuildError) as caught:
        build(tmp_path / "s.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"no model", bytes(1000)])
def test_bytes_that_are_no_model(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(BuildError, match=r"tensorrt-rtx, m\.onnx"):
        build(path)


def test_open_size_that_is_no_batch(tmp_path: Path) -> None:
    model = onnx.load(convolution(tmp_path / "m.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"input images: .*expected every size known but the batch"):
        build(tmp_path / "m.onnx")


def test_running_needs_a_gpu(tmp_path: Path) -> None:
    build(convolution(tmp_path / "m.onnx"))
    with pytest.raises(RuntimeUnavailable, match="needs a GPU to run"):
        backend("tensorrt-rtx").load(BuildRequest(tmp_path / "m.onnx", "tensorrt-rtx"), tmp_path / "e.plan")
    with pytest.raises(RuntimeUnavailable):
        backend("tensorrt-rtx").identity(BuildRequest(tmp_path, "tensorrt-rtx", device="cuda:99"))


def test_ctrl_c_stops_a_build(tmp_path: Path) -> None:
    """The builder's first step interrupts the main thread, as a terminal would."""
    import _thread

    target = tmp_path / "e.plan"
    request = BuildRequest(convolution(tmp_path / "m.onnx", channels=512), "tensorrt-rtx")
    with pytest.raises(KeyboardInterrupt):
        backend("tensorrt-rtx").build(request, target, lambda step: _thread.interrupt_main())
    assert not target.exists()


def test_out_of_memory_is_tried_again_with_half_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's builder says when its memory runs out is put into the log, twice; the third build is real."""
    from engines import trt_build

    genuine, limits, steps = trt_build._serialized, list[int](), list[str]()

    def short(trt: Any, builder: Any, network: Any, config: Any, progress: Any) -> bytes | None:
        limits.append(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))
        if limits[-1] > 256 << 20:
            builder.logger.log(trt.ILogger.Severity.ERROR, "Requested amount of GPU memory: out of memory")
            return None
        return genuine(trt, builder, network, config, progress)

    monkeypatch.setattr(trt_build, "_serialized", short)
    request = BuildRequest(convolution(tmp_path / "m.onnx"), "tensorrt-rtx", options=Options(workspace_bytes=1 << 30))
    built = backend("tensorrt-rtx").build(request, tmp_path / "e.plan", steps.append)
    assert limits == [1 << 30, 512 << 20, 256 << 20]
    assert built.details["workspace_bytes"] == 256 << 20
    assert [s for s in steps if "memory" in s] == ["out of memory; again with 512 MiB of workspace",
                                                   "out of memory; again with 256 MiB of workspace"]
    limits.clear()
    monkeypatch.setattr(trt_build, "SMALLEST_WORKSPACE", 512 << 20)
    with pytest.raises(BuildError, match="out of memory"):
        backend("tensorrt-rtx").build(request, tmp_path / "f.plan", steps.append)
    assert not (tmp_path / "f.plan").exists()


def test_precision_is_read_from_the_inspector() -> None:
    """Layers as in the developer guide's example, of TensorRT 8 to 10."""
    def layer(kind: str, told: str) -> dict[str, Any]:
        return {"Name": "l", "LayerType": "CaskConvolution", "ParameterType": kind,
                "Inputs": [{"Name": "x", "Dimensions": [16, 512, 28, 28], "Format/Datatype": told}]}

    text = json.dumps({"Layers": [
        layer("Convolution", "Thirty-two wide channel vectorized row major Int8 format"),
        layer("Convolution", "Channel major FP16 format where channel % 8 == 0"), layer("Pooling", "Row major Int8"),
        {"Name": "gemm", "LayerType": "gemm", "Inputs": [{"Name": "x", "Datatype": "Float"}]},
        layer("Convolution", "N/A due to dynamic shapes"), "name only"]})
    assert inspected(text, tf32=False) == {"int8": 1, "fp16": 1, "fp32": 1}
    assert inspected(text, tf32=True) == {"int8": 1, "fp16": 1, "tf32": 1}
    assert inspected('{"Layers": ["a", "b"]}', tf32=False) == {}


@pytest.mark.parametrize(("kind", "precision"), [(TensorProto.FLOAT8E4M3FN, "fp8"), (TensorProto.INT8, "int8")])
def test_quantized_convolutions_are_told_apart(kind: int, precision: str, tmp_path: Path) -> None:
    model = onnx.load(convolution(tmp_path / "m.onnx"))
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    model.graph.initializer.extend([helper.make_tensor("scale", TensorProto.FLOAT, [], [0.05]),
                                    helper.make_tensor("zero", kind, [], b"\0", raw=True)])
    for i, name in enumerate(list(conv.input[:2])):
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", [f"{name}8", "scale", "zero"], [f"{name}d"]))
        model.graph.node.insert(0, helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}8"]))
        conv.input[i] = f"{name}d"
    model.opset_import[0].version = 19
    onnx.save(model, tmp_path / "q.onnx")
    built = build(tmp_path / "q.onnx", precision, compute_capabilities=("89",))[0]
    assert built.layers == {precision: 1, "fp32": 1}
