"""The export command as a user runs it: what it writes, prints, refuses and survives."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export import checks
from export.errors import CheckFailed, UsageError, WorkspaceError
from pipeline import cli
from pipeline import workspace as workspace_module
from pipeline.export import ExportRequest, export
from pipeline.workspace import opened
from tests.export.test_weights import write_v2
from tests.golden.reference import CASES

ROOT = Path(__file__).parents[2]
SMALL = ("resnet_v2_18", "--size", "33x33", "--classes", "5")


def run(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.main(["export", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def failed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    """The one line on stderr of a run that fails."""
    assert run(*arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def small(out: Path, **changes: object) -> ExportRequest:
    return ExportRequest("resnet_v2_18", out, size=(33, 33), classes=5, **changes)  # type: ignore[arg-type]


def test_tf1_checkpoint_by_command_line_equals_the_original(tmp_path: Path) -> None:
    case = CASES["resnet_v2_50"]
    checkpoint = write_v2(tmp_path / "resnet_v2_50.ckpt", {n: case.variables.read(n) for n in case.shapes})
    command = [sys.executable, "-m", "pipeline.export", "resnet_v2_50", "--weights", checkpoint, "--out", str(tmp_path),
               "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    manifest = json.loads(done.stdout)
    assert done.stderr == ""
    session = onnxruntime.InferenceSession(str(tmp_path / "resnet_v2_50" / "model.onnx"))
    logits = session.run(["logits"], {"images": case.images})[0]
    expected = case.arrays["logits"].reshape(2, 1001)
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 1e-4
    assert manifest["weights"] == "resnet_v2_50.ckpt"
    assert {row["batch"] for row in manifest["comparisons"]} == {1, 3}


def test_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "block1/unit_2/basic_v2" in printed
    assert "parameters" in printed
    folder = tmp_path / "resnet_v2_18"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {n: workspace_module.sha256(folder / n) for n in ("model.onnx", "reference.npz")}
    proto = onnx.load(folder / "model.onnx")
    meta = {p.key: p.value for p in proto.metadata_props}
    assert meta["enginesmith.network"] == "resnet_v2_18"
    assert json.loads(meta["enginesmith.options"])["classes"] == 5
    assert len(meta["enginesmith.weights_sha256"]) == 64
    assert proto.opset_import[0].version == 18
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    with np.load(folder / "reference.npz") as reference:
        for batch in (1, 3):
            found = session.run(["logits"], {"images": reference[f"batch_{batch}/input/images"]})[0]
            np.testing.assert_allclose(found, reference[f"batch_{batch}/output/logits"], rtol=1e-3, atol=1e-5)


def test_identical_export_is_recognised_and_force_gives_the_same_bytes(tmp_path: Path) -> None:
    first = export(small(tmp_path))
    model = first.folder / "model.onnx"
    stamp, data = model.stat().st_mtime_ns, model.read_bytes()
    again = export(small(tmp_path))
    assert again.reused
    assert model.stat().st_mtime_ns == stamp
    assert again.end_points == first.end_points
    assert not export(small(tmp_path, force=True)).reused
    assert model.read_bytes() == data
    assert not export(small(tmp_path, seed=1)).reused
    assert model.read_bytes() != data


def test_damaged_artifact_is_exported_again(tmp_path: Path) -> None:
    model = export(small(tmp_path)).folder / "model.onnx"
    data = model.read_bytes()
    model.write_bytes(data[:-1])
    assert not export(small(tmp_path)).reused
    assert model.read_bytes() == data


@pytest.mark.parametrize(("arguments", "shape", "dtype"), [
    (("--preprocess", "own"), ["batch", 33, 33, 3], "uint8"),
    (("--layout", "nchw", "--batch", "2"), [2, 3, 33, 33], "float32"),
    (("--layout", "nchw", "--preprocess", "caffe", "--outputs", "block4,logits"), ["batch", 3, 33, 33], "uint8")])
def test_interface(arguments: tuple[str, ...], shape: list[object], dtype: str, tmp_path: Path,
                   capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, *arguments, "--out", str(tmp_path), "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["inputs"] == [{"name": "images", "dtype": dtype, "shape": shape}]
    if "--outputs" in arguments:
        assert [o["shape"] for o in manifest["outputs"]] == [["batch", 512, 2, 2], ["batch", 5]]


def test_numbers_that_differ_are_rejected_and_the_earlier_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(small(tmp_path)).folder
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".onnx", ".npz", ".json")}
    true_outputs = checks.keras_outputs
    monkeypatch.setattr(checks, "keras_outputs", lambda *a: {n: v * 1.001 for n, v in true_outputs(*a).items()})
    message = failed(capsys, *SMALL, "--seed", "1", "--out", str(tmp_path), code=3)
    assert "relative L2 error" in message
    assert (folder / "model.onnx.rejected").stat().st_size > 1e6
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_shape_that_differs_names_the_end_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    from export import catalog

    declared = catalog.declared_shapes
    monkeypatch.setattr(catalog, "declared_shapes", lambda c: {**declared(c), "block3": (None, 9, 9, 256)})
    message = failed(capsys, *SMALL, "--out", str(tmp_path), code=3)
    assert "shape of block3: Keras Nx2x2x256, ONNX Nx2x2x256; expected Nx9x9x256" in message
    assert not list((tmp_path / "resnet_v2_18").glob("*.onnx*"))


@pytest.mark.parametrize(("arguments", "text"), [
    (("resnet_v2_51",), "did you mean resnet_v2_50?"),
    ((*SMALL, "--outputs", "logit"), "did you mean logits?"),
    ((*SMALL, "--weights", "/nowhere/a.ckpt"), "no such checkpoint"),
    ((*SMALL, "--weights", "imagenet"), "has no such network"),
    ((*SMALL, "--option", "stride"), "KEY=VALUE"),
    (("vgg_16", "--size", "100x100"), "at least 224x224"),
    ((*SMALL, "--batch", "0"), "dynamic, or 1 and more"),
    ((*SMALL, "--opset", "22"), "14 to 18"),
    ((*SMALL, "--preprocess", "blur"), "one of none, own"),
    (("absent.keras",), "no such file"),
    (("no_such_module:build",), "No module named")])
def test_a_users_mistake_is_one_line(arguments: tuple[str, ...], text: str, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert text in failed(capsys, *arguments, "--out", str(tmp_path))
    assert not list(tmp_path.rglob("*.onnx*"))


def test_users_model_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import keras

    layers = keras.layers
    images = keras.Input((12, 12, 3))
    features = layers.Conv2D(4, 3, name="features")(images)
    keras.Model(images, layers.Dense(2, name="scores")(layers.Flatten()(features))).save(tmp_path / "mine.keras")
    assert run(str(tmp_path / "mine.keras"), "--out", str(tmp_path), "--outputs", "features,scores", "--json") == 0
    assert [o["name"] for o in json.loads(capsys.readouterr().out)["outputs"]] == ["features", "scores"]
    lambda_model = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: x * 2)])
    lambda_model.save(tmp_path / "code.keras")
    assert "--unsafe" in failed(capsys, str(tmp_path / "code.keras"), "--out", str(tmp_path))
    assert run(str(tmp_path / "code.keras"), "--out", str(tmp_path), "--unsafe") == 0


def test_names_that_tensorflow_has_no_scope_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keras on another backend runs a model with such names, and saves it; markup they are not."""
    import keras

    layers = keras.layers
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="inner: 1")], name="block (1)")
    x = keras.Input((4,), name="x")
    model = keras.Model(x, layers.Dense(2, name="scores[bold] 2")(inner(x)), name="a net")
    model.save(tmp_path / "my net[1].keras")
    assert run(str(tmp_path / "my net[1].keras"), "--out", str(tmp_path)) == 0
    assert "scores[bold] 2" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "my net[1]/model.onnx")
    fed = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    (found,) = session.run(["scores[bold] 2"], {"x": fed})
    np.testing.assert_allclose(found, model(fed), rtol=1e-5, atol=1e-6)


def test_layer_that_onnx_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd_model.py").write_text(
        "import keras, tensorflow as tf\n"
        "class Odd(keras.layers.Layer):\n"
        "    def call(self, x): return tf.raw_ops.Betainc(a=x, b=x, x=x)\n"
        "def build():\n"
        "    x = keras.Input((4,))\n"
        "    return keras.Model(x, Odd()(x))\n")
    monkeypatch.chdir(tmp_path)
    assert "Betainc" in failed(capsys, "odd_model:build", "--out", str(tmp_path))


# --- disks, locks, kills -------------------------------------------------------------------------------------------

def test_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give another --out" in failed(capsys, *SMALL, "--out", "/proc/enginesmith")


def test_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    command = [sys.executable, "-m", "pipeline.export", *SMALL, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: artifact folder")
    assert [p.name for p in (tmp_path / "resnet_v2_18").iterdir() if p.name != ".lock"] == []


def test_two_exports_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path / "resnet_v2_18"):
        message = failed(capsys, *SMALL, "--out", str(tmp_path))
    assert "another enginesmith process is writing" in message
    assert run(*SMALL, "--out", str(tmp_path)) == 0


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours may catch it and tidy up."""


def write(folder: Path, text: str) -> None:
    with opened(folder) as held:
        for name in ("a", "b"):
            held.stage(name, lambda path: path.write_text(text))
        held.commit({"text": text}, ("a", "b"))


def test_kill_at_any_step_leaves_the_earlier_or_the_later_state(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for fatal in range(100):
        folder = tmp_path / str(fatal)
        write(folder, "old")
        calls = 0

        def step(real, *arguments, fatal=fatal):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls > fatal:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "replace"), (Path, "write_text"), (Path, "unlink"), (os, "fsync")):
                real = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, real=real: step(real, *a))
            try:
                write(folder, "new")
                ended = True
            except Killed:
                ended = False
        with opened(folder) as held:
            manifest = held.manifest()
        assert manifest is not None
        states = {manifest["text"], (folder / "a").read_text(), (folder / "b").read_text()}
        assert len(states) == 1
        seen |= states
        assert {p.name for p in folder.iterdir()} == {"a", "b", "manifest.json", ".lock"}
        if ended:
            break
    assert seen == {"old", "new"}
    assert fatal > 5


def test_a_killed_process_leaves_the_earlier_artifact(tmp_path: Path) -> None:
    folder = export(small(tmp_path)).folder
    before = (folder / "model.onnx").read_bytes()
    command = [sys.executable, "-m", "pipeline.export", *SMALL, "--seed", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("write"):
            break
    time.sleep(0.05)
    process.kill()
    process.communicate()
    with opened(folder) as held:
        assert held.manifest() is not None
    assert (folder / "model.onnx").read_bytes() == before
    assert export(small(tmp_path)).reused


def test_errors_have_their_exit_codes() -> None:
    assert [error("a", "b").exit_code for error in (UsageError, WorkspaceError, CheckFailed)] == [1, 1, 3]
    assert str(UsageError("subject", "found", "this", "do that")) == "subject: found; expected this; do that"


def test_usage_is_exit_2() -> None:
    assert run("--no-such-option") == 2
