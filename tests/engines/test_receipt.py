"""Receipts and models as files: what is found again, what is refused and why, and that no bytes crash the loader."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import model_file, receipt
from engines.errors import EngineError, ModelFileError, StaleEngine
from engines.receipt import Receipt
from engines.runtime import BuildRequest, Built, Identity, Options, Profile
from tests.engines.models import convolution

HERE = Identity("onnxruntime", "1.32.0", "some CPU")
REQUEST = BuildRequest(Path("m.onnx"), "onnxruntime", "int8", profiles=(Profile(1, 4, 8),), options=Options(threads=2))
FUZZ = settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, request: BuildRequest = REQUEST, sha: str = "a" * 64, data: bytes = b"engine") -> Receipt:
    wanted = receipt.key(request, HERE, sha)
    name = receipt.engine_id(wanted) + ".onnx"
    (folder / name).write_bytes(data)
    made = receipt.make(wanted, folder / name, name, Built({"int8": 3}, "a test"), 0.5)
    (folder / f"{receipt.engine_id(wanted)}.json").write_text(json.dumps(asdict(made)))
    return made


def test_an_engine_is_found_by_everything_that_decides_it(tmp_path: Path) -> None:
    made = write(tmp_path)
    assert receipt.find(tmp_path, receipt.key(REQUEST, HERE, "a" * 64)) == made
    assert receipt.request_of(made, Path("m.onnx")) == REQUEST
    for changed, text in (
            ((REQUEST, HERE, "b" * 64), "model_sha256 was aaaaaaaaaaaa..., is bbbbbbbbbbbb..."),
            ((REQUEST, replace(HERE, version="1.33.0"), "a" * 64), "version was 1.32.0, is 1.33.0"),
            ((REQUEST, replace(HERE, device="other"), "a" * 64), "device was some CPU, is other"),
            ((replace(REQUEST, profiles=(Profile(1, 1, 8),)), HERE, "a" * 64), "profiles was"),
            ((replace(REQUEST, options=Options(threads=1)), HERE, "a" * 64), "options was")):
        found = receipt.find(tmp_path, receipt.key(*changed))
        assert isinstance(found, str)
        assert found.startswith(text)
    assert receipt.find(tmp_path, receipt.key(replace(REQUEST, precision="fp32"), HERE, "a" * 64)
                        ) == "none was built yet"


def test_an_engine_that_was_changed_is_not_loaded(tmp_path: Path) -> None:
    made = write(tmp_path)
    assert receipt.check(tmp_path, made) == tmp_path / made.file
    (tmp_path / made.file).write_bytes(b"Engine")
    with pytest.raises(StaleEngine, match="it was changed since"):
        receipt.check(tmp_path, made)
    assert "it was changed since" in str(receipt.find(tmp_path, made.key))
    (tmp_path / made.file).unlink()
    with pytest.raises(StaleEngine, match="the file is gone"):
        receipt.check(tmp_path, made)


def test_an_engine_of_another_machine_is_refused(tmp_path: Path) -> None:
    made = write(tmp_path)
    receipt.check_machine(made, HERE)
    with pytest.raises(StaleEngine, match=r"built for version '1.32.0' \(here '1.31.0'\), driver '' \(here '580'\)"):
        receipt.check_machine(made, replace(HERE, version="1.31.0", driver="580"))


@pytest.mark.parametrize("change", [{"file": "../../etc/passwd"}, {"format": 2}, {"key": {}}, {"sha256": None},
                                    {"file": ""}, {"layers": 3}, {"key": {"options": 1}}])
def test_a_receipt_that_is_not_ours(change: dict[str, object], tmp_path: Path) -> None:
    made = write(tmp_path)
    path = tmp_path / f"{receipt.engine_id(made.key)}.json"
    path.write_text(json.dumps(asdict(made) | change))
    with pytest.raises(StaleEngine, match="build the engine again"):
        receipt.read(path)
    assert receipt.every(tmp_path) == []


@FUZZ
@given(data=st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["key", "file", "sha256", "size_bytes", "build_seconds", "date", "layers", "layers_from", "tf32", "details",
         "format", "x"]), inner, max_size=12)).map(lambda value: json.dumps(value).encode()))
def test_no_bytes_crash_the_receipts_reader(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(data)
    try:
        receipt.check(tmp_path, receipt.read(path))
    except StaleEngine as error:
        assert "\n" not in str(error)


@FUZZ
@given(data=st.data())
def test_no_damage_to_a_receipt_crashes(data: st.DataObject, tmp_path: Path) -> None:
    made = asdict(write(tmp_path))
    part = made if data.draw(st.booleans()) else made["key"]
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(
        st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
    path = tmp_path / "r.json"
    path.write_text(json.dumps(made))
    try:
        found = receipt.read(path)
        receipt.check(tmp_path, found)
        receipt.check_machine(found, HERE)
        receipt.request_of(found, Path("m.onnx"))
    except EngineError as error:
        assert "\n" not in str(error)


@FUZZ
@given(data=st.data())
def test_no_damage_to_a_model_crashes_its_reader(data: st.DataObject, tmp_path: Path) -> None:
    whole = SMALL.read_bytes() if SMALL.exists() else b""
    cut = data.draw(st.integers(0, len(whole)))
    damaged = bytearray(data.draw(st.sampled_from([whole[:cut], whole[cut:], data.draw(st.binary(max_size=200))])))
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.onnx"
    path.write_bytes(damaged)
    try:
        found = model_file.read(path)
        assert found.outputs
    except ModelFileError as error:
        assert "\n" not in str(error)


SMALL = Path(__file__).with_name("small.onnx")


@pytest.fixture(scope="module", autouse=True)
def small_model() -> object:
    convolution(SMALL, channels=2)
    yield
    SMALL.unlink()


def test_what_a_model_says_of_itself(tmp_path: Path) -> None:
    found = model_file.read(convolution(tmp_path / "m.onnx"))
    assert [(s.name, str(s.dtype), s.shape) for s in (*found.inputs, *found.outputs)] == [
        ("images", "float32", (None, 3, 8, 8)), ("scores", "float32", (None, 5))]
    assert found.batch is None
    assert model_file.read(convolution(tmp_path / "f.onnx", batch=4)).batch == 4


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "sub/../../w.bin", ""])
def test_external_data_stays_in_the_models_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = onnx.load(convolution(folder / "m.onnx"))
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    before = model_file.read(folder / "m.onnx").sha256
    (tmp_path / "w.bin").write_bytes((folder / "w.bin").read_bytes())
    (folder / "w.bin").write_bytes(bytes(10 + (folder / "w.bin").stat().st_size))
    assert model_file.read(folder / "m.onnx").sha256 != before
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match="expected external data inside of the model's folder"):
        model_file.read(folder / "m.onnx")


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    onnx.save(onnx.load(convolution(tmp_path / "m.onnx")), tmp_path / "m.onnx", save_as_external_data=True,
              location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelFileError, match=r"no file 'w.bin' beside it; .*; copy both files together"):
        model_file.read(tmp_path / "m.onnx")
