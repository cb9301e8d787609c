"""A user's model from every form it comes in, and one line for each that cannot be loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from export import checks, models
from export.errors import CheckFailed, ModelError, UsageError
from tests.export.small import convert_small, functional, stack

CLASSIFIER = stack("Conv2D(4, 3, name='first')", "Flatten()", "Dense(5, 'softmax', name='probabilities')")


def load(source: object, unsafe: bool = False, outputs: tuple[str, ...] = (), size: tuple[int, int] | None = None,
         seed: int = 0) -> Any:
    return models.load(str(source), unsafe, seed, outputs, size)


def saved(model: Any, path: Path) -> Path:
    if path.suffix:
        model.save(path)
    else:
        model.export(path, verbose=False)
    return path


@pytest.mark.parametrize("form", ["m.keras", "m.h5", "saved_model"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*HDF5 file.*")
def test_every_file_form_gives_the_models_output(form: str, tmp_path: Path) -> None:
    model = CLASSIFIER()
    pixels = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    expected = np.asarray(model(pixels))
    loaded = load(saved(model, tmp_path / form))
    assert [v.name for v in loaded.inputs] == ["images"]
    (found,) = (np.asarray(v) for v in loaded(pixels).values())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    converted = convert_small(load(tmp_path / form), tmp_path / "m.onnx")
    assert max(c.relative_l2 for c in converted.comparisons) < 1e-5


def test_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo.py").write_text(
        "import keras\n"
        "def net():\n"
        "    return keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3, name='c')])\n"
        "def seven():\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    first, again, other = load("zoo:net"), load("zoo:net"), load("zoo:net", seed=1)
    assert list(first.output) == ["c"]
    weights = [np.asarray(m.weights[0]) for m in (first, again, other)]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])
    assert str(tmp_path) not in sys.path
    for source, text in (("zoo:seven", "returned int; expected a keras.Model"), ("zoo:absent", "has no attribute"),
                         ("no_such_module:net", "No module named")):
        with pytest.raises(ModelError, match=text):
            load(source)


def test_lambda_needs_unsafe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = tmp_path / "ran"
    monkeypatch.setenv("PROOF", str(proof))
    code = eval("lambda v: (__import__('pathlib').Path(__import__('os').environ['PROOF']).touch(), v * 2)[1]")
    model = functional(lambda k, x: k.Lambda(code)(x))()
    path = saved(model, tmp_path / "l.keras")
    proof.unlink()  # building the model ran the code too
    with pytest.raises(ModelError, match=r"Lambda layer, whose Python code is stored in the file.*--unsafe"):
        load(path)
    assert not proof.exists()
    found = load(path, unsafe=True)(np.ones((1, 16, 16, 3), np.float32))
    assert float(np.asarray(next(iter(found.values()))).max()) == 2
    assert proof.exists()


def test_outputs_may_be_layers_inside(tmp_path: Path) -> None:
    path = saved(CLASSIFIER(), tmp_path / "m.keras")
    assert list(load(path).output) == ["probabilities"]
    assert load(path, outputs=("first", "probabilities")).output["first"].shape == (None, 14, 14, 4)
    with pytest.raises(UsageError, match=r"output 'logits': small has no such output or layer; "
                                         r"expected one of probabilities, first, flatten"):
        load(path.rename(tmp_path / "small.keras"), outputs=("logits",))


def test_open_size_is_settled_by_size(tmp_path: Path) -> None:
    path = saved(stack("Conv2D(4, 3)", "GlobalAveragePooling2D()", shape=(None, None, 3))(), tmp_path / "open.keras")
    assert load(path, size=(20, 24)).inputs[0].shape == (None, 20, 24, 3)
    with pytest.raises(ModelError, match="every size known but the batch; give --size HxW"):
        load(path)
    fixed = saved(CLASSIFIER(), tmp_path / "fixed.keras")
    assert load(fixed, size=(16, 16)).inputs[0].shape == (None, 16, 16, 3)
    with pytest.raises(UsageError, match="size 20x24: the model's input is 16x16"):
        load(fixed, size=(20, 24))
    tokens = saved(stack("Dense(2)", shape=(None, 4))(), tmp_path / "tokens.keras")
    with pytest.raises(ModelError, match="build the model with a fixed input shape"):
        load(tokens)


def _unbuilt(path: Path) -> None:
    keras.Sequential([keras.layers.Dense(2)]).save(path)


def _half(path: Path) -> None:
    data = saved(CLASSIFIER(), path).read_bytes()
    path.write_bytes(data[:len(data) // 2])


@pytest.mark.parametrize(("name", "write", "text"), [
    ("absent.keras", lambda path: None, "no such file"),
    ("text.keras", lambda path: path.write_text("no model"), "not loadable"),
    ("text.h5", lambda path: path.write_text("no model"), "not loadable"),
    ("half.keras", _half, "not loadable"),
    ("folder", lambda path: path.mkdir(), "not loadable.*signature serving_default"),
    ("unbuilt.keras", _unbuilt, "input shape is not known"),
])
@pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built")
def test_what_cannot_be_loaded_is_one_line(name: str, write: Callable[[Path], object], text: str,
                                           tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises((ModelError, CheckFailed), match=text) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_names() -> None:
    assert models.is_user_model("a/b.keras")
    assert models.is_user_model("pkg.mod:fn")
    assert not models.is_user_model("resnet_v2_50")
    assert models.artifact_name("a/b.keras") == "b"
    assert models.artifact_name("pkg.mod:fn") == "fn"


# --- the checks themselves ---------------------------------------------------------------------------------------

def test_output_of_another_shape_is_found() -> None:
    rows = [checks.EndPoint("a", (None, 4), (None, 4), (None, 4)), checks.EndPoint("b", None, (None, 7), (None, None)),
            checks.EndPoint("c", (None, 3), (None, 2), (None, 2))]
    checks.check_shapes(rows[:1], ["a"])
    with pytest.raises(CheckFailed, match=r"shape of b: Keras Nx7, ONNX NxN \(2 of 3 .* differ\); expected Nx7"):
        checks.check_shapes(rows, ["a"])
    with pytest.raises(CheckFailed, match="the model lacks d"):
        checks.check_shapes(rows[:1], ["a", "d"])


@pytest.mark.parametrize("error", [2e-4, float("nan"), float("inf")])
def test_numbers_that_are_far_off_are_found(error: float) -> None:
    def row(value: float, output: str) -> checks.Comparison:
        return checks.Comparison(output, 3, "on", value, value, 1.0)

    checks.check_numbers([row(0.9e-4, "a")])
    with pytest.raises(CheckFailed, match=r"output b at batch 3, ONNX Runtime optimizations on"):
        checks.check_numbers([row(1e-6, "a"), row(error, "b"), row(1e-6, "c")])


def test_one_changed_weight_is_seen_in_the_numbers(tmp_path: Path) -> None:
    model, path = CLASSIFIER(), tmp_path / "m.onnx"
    convert_small(model, path)
    fed = {"images": np.random.default_rng(0).random((2, 16, 16, 3), np.float32)}
    truth = {"probabilities": np.asarray(model(fed["images"]))}
    assert max(c.relative_l2 for c in checks.compare(str(path), [(fed, truth)])) < 1e-5
    kernel = model.get_layer("first").kernel
    changed = np.asarray(kernel).copy()
    changed[1, 1, 0, 2] += 0.1
    kernel.assign(changed)
    truth = {"probabilities": np.asarray(model(fed["images"]))}
    with pytest.raises(CheckFailed, match="relative L2 error"):
        checks.check_numbers(checks.compare(str(path), [(fed, truth)]))
    with pytest.raises(CheckFailed, match=r"output probabilities at batch 2: shape \(2, 5\); expected \(2, 4\)"):
        checks.compare(str(path), [(fed, {"probabilities": truth["probabilities"][:, :4]})])


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(convert_small(CLASSIFIER(), path).data[:-100])
    with pytest.raises(CheckFailed, match=r"onnx.checker"):
        checks.check_file(str(path))
    with pytest.raises(ModelError, match="ONNX Runtime: does not load the model"):
        checks.compare(str(path), [])
