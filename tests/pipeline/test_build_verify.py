"""The build and verify commands as a user runs them, on a small classifier and on networks of the catalog."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from engines.runtime import BuildRequest, Profile, backend
from export import precision
from export.errors import UsageError
from pipeline import build, calibration, cli, verify
from tests.engines.models import convolution, images

RTX = ("--runtime", "tensorrt-rtx")
EVERY = ("--runtime", "onnxruntime", "--runtime", "openvino", "--runtime", "tensorrt-rtx",
         "--precision", "fp32", "--precision", "fp16", "--precision", "int8")


def run(*arguments: object) -> int:
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[dict[str, Any]]:
    assert run(*arguments, "--json") == code
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def failed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    assert run(*arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    yield convolution(tmp_path / "small.onnx")


def test_an_onnx_file_goes_through_both(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "a")
    rows = {(r["runtime"], r["precision"]): r for r in printed(capsys, "build", model, *out, *EVERY)}
    assert len(rows) == 9
    for (runtime, kind), row in rows.items():
        if row["status"] == "refused":  # a CPU may lack fp16
            assert kind == "fp16"
            assert "expected most of 2 in fp16" in row["why"]
        else:
            assert row["status"] == "built"
            assert row["receipt"]["layers"] == {kind: 2}
            assert (tmp_path / "a" / "small" / "engines" / row["receipt"]["file"]).stat().st_size \
                == row["receipt"]["size_bytes"], runtime
    again = printed(capsys, "build", model, *out, *EVERY)
    assert {r["status"] for r in again} <= {"cached", "refused"}
    assert {r["status"] for r in printed(capsys, "build", model, *out, "--force")} == {"built"}
    found = printed(capsys, "verify", tmp_path / "a" / "small", "--rebuilds", 1)
    assert {r["status"] for r in found if r["runtime"] != "tensorrt-rtx"} == {"passed"}
    for row in found:
        if row["status"] == "passed":
            assert [c["batch"] for c in row["comparisons"]] == [1, 8, 32]
            assert row["rebuilds"] is not None
        else:
            assert "needs a GPU to run" in row["reason"]


def test_network_of_the_catalog(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way by three commands; ResNet's pre-activations quantize as one operation each."""
    assert run("export", "resnet_v2_18", "--size", "65x65", "--out", tmp_path) == 0
    capsys.readouterr()
    rows = printed(capsys, "build", "resnet_v2_18", "--out", tmp_path, "--profile", "1,2,4", *EVERY)
    assert {(r["runtime"], r["precision"]) for r in rows if r["status"] == "refused"} <= {
        ("onnxruntime", "fp16"), ("openvino", "fp16")}
    engine = next(r["receipt"]["file"] for r in rows if (r["runtime"], r["precision"]) == ("onnxruntime", "int8"))
    left = {n.op_type for n in onnx.load(tmp_path / "resnet_v2_18" / "engines" / engine).graph.node}
    assert not left & {"Conv", "BatchNormalization", "QLinearMul", "Mul"}
    assert {r["status"] for r in printed(capsys, "verify", "resnet_v2_18", "--out", tmp_path)} == {"passed", "not run"}


def test_verify_finds_the_node_that_departs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine is built from a model with one other weight than the reference's, under a receipt that is in order."""
    out = tmp_path / "a"
    assert run("build", model, "--out", out) == 0
    wrong = onnx.load(model)
    scale = onnx.numpy_helper.to_array(wrong.graph.initializer[2]) * 1.5
    wrong.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(scale, wrong.graph.initializer[2].name))
    wrong.producer_name = "enginesmith"
    other = tmp_path / "other.onnx"
    onnx.save(wrong, other)
    assert run("build", other, "--out", out, "--precision", "int8") == 0
    reference = np.load(out / "small" / "reference.npz")
    capsys.readouterr()

    from pipeline import divergence

    (out / "small" / "model.int8.onnx").write_bytes((out / "other" / "model.int8.onnx").read_bytes())
    wish = BuildRequest(out / "small" / "model.int8.onnx", "onnxruntime", "int8", profiles=(Profile(1, 1, 1),))
    found = divergence.first_node(wish, {"images": reference["batch_1/input/images"]}, 0.2)
    assert "first node that departs: last (Gemm)" in found


def test_limits_are_the_users(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", model, "--out", tmp_path, "--precision", "int8") == 0
    capsys.readouterr()
    rows = printed(capsys, "verify", model, "--out", tmp_path, "--max-error", "int8=1e-9", code=3)
    assert rows[0]["status"] == "failed"
    assert "limit 1e-09; first node that departs: " in rows[0]["reason"]


def test_a_plan_that_was_changed_is_not_loaded(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", model, "--out", tmp_path) == 0
    (engine,) = (tmp_path / "small" / "engines").glob("*.onnx")
    engine.write_bytes(engine.read_bytes() + b"x")
    capsys.readouterr()
    assert "it was changed since" in failed(capsys, "verify", model, "--out", tmp_path, code=3)
    (row,) = printed(capsys, "build", model, "--out", tmp_path)
    assert row["status"] == "built"
    assert "it was changed since" in row["why"]
    assert run("verify", model, "--out", tmp_path) == 0


@pytest.mark.parametrize(("arguments", "text"), [
    (("--precision", "fp4"), "precision 'fp4': unknown; expected one of fp32, tf32, fp16, bf16, fp8, int8"),
    (("--runtime", "ncnn"), "runtime 'ncnn': unknown; expected one of onnxruntime"),
    (("--profile", "4,2,8"), "profile 4,2,8: not in order; expected 1 <= min <= opt <= max"),
    (("--profile", "1,2"), "profile '1,2': not three batch sizes"),
    (("--device", "cuda:99"), "cuda:99"),
    (("--precision", "bf16"), "bf16 is not a precision it computes in"),
    (("--precision", "int8", "--calibrate", "nowhere"), "calibration data nowhere: no such file or folder"),
    (("--precision", "int8", "--calibration-method", "magic"), "expected one of minmax, entropy, percentile"),
    (("--runtime", "tensorrt"), "tensorrt"),
    *([] if importlib.util.find_spec("modelopt") else [
        ((*RTX, "--precision", "fp8"), "nvidia-modelopt: not installed; pip install 'enginesmith[modelopt]'"),
        ((*RTX, "--precision", "fp16", "--autocast"), "nvidia-modelopt: not installed")]),
])
def test_a_users_mistake_is_one_line(arguments: tuple[str, ...], text: str, model: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert text in failed(capsys, "build", model, "--out", tmp_path / "a", *arguments)
    assert not list((tmp_path / "a").glob("**/*.new"))
    assert not list((tmp_path / "a").glob("*/engines/*"))


@pytest.mark.parametrize("data", [b"", b"no model", bytes(500)])
def test_a_file_that_is_no_model(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    assert "m.onnx: " in failed(capsys, "build", tmp_path / "m.onnx", "--out", tmp_path / "a")
    assert not (tmp_path / "a" / "m" / "manifest.json").exists()


def test_verify_without_engines(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "python -m pipeline.build" in failed(capsys, "verify", model, "--out", tmp_path)
    for wrong in ("int8", "int8=x", "int4=1", "int8=-1"):
        assert "expected PRECISION=X" in failed(capsys, "verify", model, "--out", tmp_path, "--max-error", wrong)


# --- precision and calibration -----------------------------------------------------------------------------------

@pytest.mark.parametrize("method", precision.METHODS)
@pytest.mark.parametrize("form", precision.FORMS)
def test_int8_is_near_float_by_every_method(form: str, method: str, model: Path, tmp_path: Path) -> None:
    import onnxruntime

    target = tmp_path / "q.onnx"
    precision.to_int8(model, target, form, images(16, 1), method)
    truth, found = (onnxruntime.InferenceSession(str(path)).run(None, images(8))[0] for path in (model, target))
    assert 0 < np.linalg.norm(found - truth) / np.linalg.norm(truth) < 0.1
    types = {w.data_type for w in onnx.load(target).graph.initializer}
    assert (onnx.TensorProto.UINT8 in types) == (form == "int8")


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_kept_nodes_stay_in_float(kind: str, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "h.onnx"
    precision.to_half(model, target, kind, keep=("first",))
    weights = {w.name: w.data_type for w in onnx.load(target).graph.initializer}
    assert onnx.TensorProto.FLOAT in weights.values()
    fed = onnx.load(target).graph
    assert {v.type.tensor_type.elem_type for v in (*fed.input, *fed.output)} == {onnx.TensorProto.FLOAT}
    precision.to_int8(model, target, "int8", images(4), keep=("first",))
    graph = onnx.load(target).graph
    first = next(n for n in graph.node if n.name == "first")
    assert first.input[0] == "images"


def test_calibration_from_images_and_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "images", tmp_path / "a"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    assert run("export", "resnet_v2_18", "--size", "33x33", "--out", out) == 0
    capsys.readouterr()
    command = ("build", "resnet_v2_18", "--out", out, "--precision", "int8", "--calibrate")
    first = printed(capsys, *command, folder)[0]
    assert (first["status"], printed(capsys, *command, folder)[0]["status"]) == ("built", "cached")
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes())
    assert printed(capsys, *command, folder)[0]["status"] == "cached"  # the same ranges give the same file
    np.save(tmp_path / "x.npy", rng.random((5, 33, 33, 3), np.float32))
    assert printed(capsys, *command, tmp_path / "x.npy")[0]["status"] == "built"
    for array, text in ((np.full((2, 33, 33, 3), np.nan, np.float32), "image 0 holds NaN or Inf"),
                        (np.zeros((2, 8, 8, 3), np.float32), "expected float32 (count, 33, 33, 3)"),
                        (np.zeros((2, 33, 33, 3)), "float64"), (np.zeros((0, 33, 33, 3), np.float32), "no images")):
        np.save(tmp_path / "y.npy", array)
        assert text in failed(capsys, *command, tmp_path / "y.npy")
    (tmp_path / "z.npy").write_bytes(b"no array")
    assert "not an .npy file" in failed(capsys, *command, tmp_path / "z.npy")
    (folder / "4.png").write_bytes(b"no image")
    assert "4.png: not readable" in failed(capsys, *command, folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images in it" in failed(capsys, *command, empty)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_calibration_of_a_model_with_a_fixed_batch(count: int, tmp_path: Path) -> None:
    source = convolution(tmp_path / "m.onnx", batch=3)
    precision.to_int8(source, tmp_path / "q.onnx", "int8", images(count))
    options = BuildRequest(tmp_path / "q.onnx", "onnxruntime", "int8")
    built = backend("onnxruntime").build(options, tmp_path / "e.onnx", lambda step: None)
    assert built.layers == {"int8": 2}


def test_labelled_data_gives_each_class_its_share(tmp_path: Path) -> None:
    manifest = {"network": "none", "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}]}
    values = np.repeat(np.arange(6, dtype=np.float32), 2).reshape(6, 2)
    np.savez(tmp_path / "d.npz", images=values, labels=np.array(["a", "a", "a", "a", "b", "c"]))
    assert calibration.load(f"{tmp_path}/d.npz", manifest, 4, None)["x"][:, 0].tolist() == [0, 4, 5, 1]
    for arrays, text in (({"images": values, "labels": np.arange(5)}, r"labels \(5,\) for images \(6, 2\)"),
                         ({"pictures": values}, r"nor an \.npz file of images and labels")):
        np.savez(tmp_path / "e.npz", **arrays)
        with pytest.raises(UsageError, match=text):
            calibration.load(f"{tmp_path}/e.npz", manifest, 4, None)


def test_images_in_a_folder_for_each_class(tmp_path: Path) -> None:
    spec = {"name": "x", "dtype": "uint8", "shape": ["batch", 4, 4, 3]}
    for name, shades in (("cat", (10, 20, 30)), ("dog", (40,))):
        (tmp_path / name).mkdir()
        for shade in shades:
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / name / f"{shade}.png")
    found = calibration.load(str(tmp_path), {"network": "none", "inputs": [spec]}, 3, None)["x"]
    assert found[:, 0, 0, 0].tolist() == [10, 40, 20]


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is not None, reason="nvidia-modelopt is installed")
def test_a_precision_whose_package_is_missing_leaves_the_others(model: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "build", model, "--out", tmp_path, *RTX, "--precision", "fp8", "--precision", "fp32")
    assert [row["status"] for row in rows] == ["refused", "built"]


def mobilenet() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3), classes=10)


def densenet() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras.applications.DenseNet121(weights=None, input_shape=(64, 64, 3), classes=10)


@pytest.mark.parametrize("network", ["mobilenet", "densenet"])
def test_model_of_keras_applications(network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = f"tests.pipeline.test_build_verify:{network}", ("--out", tmp_path)
    rows = printed(capsys, "build", model, *out, "--runtime", "onnxruntime", "--runtime", "openvino", "--precision",
                   "fp32", "--precision", "int8", "--profile", "1,2,4")
    assert [row["status"] for row in rows] == ["built"] * 4
    rows = printed(capsys, "verify", model, *out, "--max-error", "int8=10")  # random weights: int8 is beside the point
    assert {row["status"] for row in rows} == {"passed"}


# --- estimators of verify ----------------------------------------------------------------------------------------

def test_comparison_of_two_outputs() -> None:
    truth = np.array([[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]], np.float32)
    row = verify.compare("y", 2, truth * 2, truth)
    assert (row.relative_l2, row.top1, row.top5) == (1.0, 1.0, 1.0)
    assert row.cosine == pytest.approx(1)
    assert row.max_abs == 3
    turned = verify.compare("y", 2, truth[::-1].copy(), truth)
    assert (turned.top1, turned.top5) == (0, 1)
    assert verify.difference(truth, truth) == 0
    assert verify.difference(truth * 1.1, truth) == pytest.approx(0.1, rel=1e-5)


def test_engine_in_another_precision_is_refused() -> None:
    from engines.errors import PrecisionError
    from engines.runtime import Built

    wish = BuildRequest(Path("m"), "openvino", "fp16")
    build.check_precision(wish, Built({"fp16": 2, "fp32": 2}, "x"))
    build.check_precision(wish, Built({}, "x"))
    with pytest.raises(PrecisionError, match="openvino in fp16: 3 bf16, 1 fp16 compute layers in x"):
        build.check_precision(wish, Built({"bf16": 3, "fp16": 1}, "x"))


# --- precision search --------------------------------------------------------------------------------------------

def test_the_layer_that_ruins_accuracy_is_kept_in_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One channel of the first layer is a thousand times the others: one scale a tensor leaves nothing of those."""
    path = convolution(tmp_path / "hard.onnx", before=3)
    model = onnx.load(path)
    kernel = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    kernel[0] *= 1000
    rows = onnx.numpy_helper.to_array(model.graph.initializer[2]).copy()
    rows[0] /= 1000
    for i, array in ((0, kernel), (2, rows)):
        model.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(array, model.graph.initializer[i].name))
    onnx.save(model, path)
    out = ("--out", tmp_path / "a", "--precision", "int8")
    plain = printed(capsys, "build", path, *out)[0]
    assert plain["receipt"]["layers"] == {"int8": 5}
    assert printed(capsys, "verify", path, "--out", tmp_path / "a", code=3)[0]["status"] == "failed"
    found = printed(capsys, "build", path, *out, "--max-error", "0.05")[0]
    kept = json.loads((tmp_path / "a" / "hard" / "manifest.json").read_text())["variants"]["model.int8.onnx"]["kept"]
    assert found["status"] == "built"
    assert "first" in kept
    assert len(kept) < 5
    assert printed(capsys, "build", path, *out, "--max-error", "0.05")[0]["status"] == "cached"
    assert [r["status"] for r in printed(capsys, "verify", path, "--out", tmp_path / "a")] == ["passed"]


def test_int8_that_only_float_satisfies_is_not_called_int8(model: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", model, "--out", tmp_path, "--precision", "int8", "--max-error", "0") == 1
    assert "2 fp32 compute layers in ONNX Runtime's optimized graph" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.new"))


# --- the TensorFlow baseline -------------------------------------------------------------------------------------

@pytest.mark.parametrize("interface", [(), ("--preprocess", "caffe", "--layout", "nchw", "--outputs", "logits,block2")])
def test_saved_model_computes_what_the_onnx_model_does(interface: tuple[str, ...], tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    export = ("export", "resnet_v2_18", "--size", "33x33", "--out", tmp_path, *interface)
    baseline = ("build", "resnet_v2_18", "--out", tmp_path, "--runtime", "tensorflow", "--runtime", "tensorflow-xla")
    assert run(*export) == 0
    capsys.readouterr()
    assert "export it with --saved-model" in failed(capsys, *baseline[:-2])
    assert run(*export, "--saved-model") == 0
    capsys.readouterr()
    assert {r["status"] for r in printed(capsys, *baseline)} == {"built"}
    assert {r["status"] for r in printed(capsys, "verify", "resnet_v2_18", "--out", tmp_path)} == {"passed"}
    variables = next((tmp_path / "resnet_v2_18" / "saved_model" / "variables").glob("*.data*"))
    variables.write_bytes(variables.read_bytes()[::-1])
    assert "an intact artifact; export it again" in failed(capsys, "verify", "resnet_v2_18", "--out", tmp_path)
    assert run(*export, "--saved-model") == 0  # TensorFlow writes other bytes each time
    capsys.readouterr()
    assert {r["status"] for r in printed(capsys, *baseline)} == {"built"}
    assert {r["status"] for r in printed(capsys, "verify", "resnet_v2_18", "--out", tmp_path)} == {"passed"}
