"""Weights by name: real checkpoints of both forms, Keras files, ImageNet's order, random values."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from export import catalog, networks, weights
from export.catalog import NetworkConfig
from export.errors import UsageError, WeightsError

NAME = "resnet_v2_18"


def config(classes: int = 5, **options: str) -> NetworkConfig:
    return catalog.configure(NAME, (32, 32), classes, options)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """TF-Slim variables of a network with 5 classes."""
    rng = np.random.default_rng(0)
    model = networks.build(config())
    return {name: rng.uniform(0.5, 1.5, tuple(v.shape)).astype(np.float32)
            for name, v in weights.slim_variables(model).items()}


@pytest.fixture(scope="module")
def model() -> object:
    return networks.build(config())


def write_v2(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """A TF1 Saver checkpoint: prefix.index and prefix.data-00000-of-00001."""
    import tensorflow as tf

    path.parent.mkdir(parents=True, exist_ok=True)
    tf.raw_ops.SaveV2(prefix=str(path), tensor_names=list(arrays), shape_and_slices=[""] * len(arrays),
                      tensors=list(arrays.values()))
    return str(path)


def write_v1(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """The single-file form of 2016."""
    import tensorflow as tf

    tf.raw_ops.SaveSlices(filename=str(path), tensor_names=list(arrays), shapes_and_slices=[""] * len(arrays),
                          data=list(arrays.values()))
    return str(path)


def values(built: object) -> dict[str, np.ndarray]:
    return {name: np.asarray(v) for name, v in weights.slim_variables(built).items()}  # type: ignore[arg-type]


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("form", ["v2", "v2 index", "v1"])
def test_both_forms_of_checkpoint(form: str, model: object, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    suffix = ".index" if form == "v2 index" else ""
    source = write_v1(path, arrays) if form == "v1" else write_v2(path, arrays) + suffix
    weights.load(model, config(), source, 0)  # type: ignore[arg-type]
    assert same(values(model), arrays)


@pytest.mark.parametrize("scope", ["my_network", "tower_0/backbone", ""])
def test_another_scope(scope: str, model: object, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    moved = {f"{scope}/{n.removeprefix(NAME + '/')}".lstrip("/"): a for n, a in arrays.items()}
    weights.load(model, config(), write_v2(tmp_path / "m.ckpt", moved), 0)  # type: ignore[arg-type]
    assert same(values(model), arrays)


def test_training_state_is_ignored(model: object, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    conv = f"{NAME}/conv1/weights"
    state = {f"{conv}/Momentum": arrays[conv], f"{conv}/RMSProp_1": arrays[conv], f"{conv}/Adam": arrays[conv],
             f"{conv}/ExponentialMovingAverage": arrays[conv], "global_step": np.int64(7),
             "beta1_power": np.float32(0.9)}
    weights.load(model, config(), write_v2(tmp_path / "m.ckpt", {**arrays, **state}), 0)  # type: ignore[arg-type]
    assert same(values(model), arrays)


def refused(source: str, model: object, match: str) -> str:
    with pytest.raises(WeightsError, match=match) as caught:
        weights.load(model, config(), source, 0)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_missing_unused_and_misshapen_are_listed_and_nothing_is_loaded(model: object, arrays: dict[str, np.ndarray],
                                                                       tmp_path: Path) -> None:
    weights.load(model, config(), "random", 0)  # type: ignore[arg-type]
    before = values(model)
    changed = dict(arrays)
    del changed[f"{NAME}/conv1/weights"]
    changed[f"{NAME}/conv1/biases"] = np.zeros(65, np.float32)
    changed[f"{NAME}/extra/weights"] = np.zeros(3, np.float32)
    message = refused(write_v2(tmp_path / "m.ckpt", changed), model, "m.ckpt")
    assert f"missing 1: {NAME}/conv1/weights" in message
    assert f"of another shape 1: {NAME}/conv1/biases 65 instead of 64" in message
    assert f"unused 1: {NAME}/extra/weights" in message
    assert same(values(model), before)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("form", ["v1", "v2"])
def test_truncated_checkpoint(keep: float, form: str, model: object, arrays: dict[str, np.ndarray],
                              tmp_path: Path) -> None:
    write = write_v1 if form == "v1" else write_v2
    source = write(tmp_path / "m.ckpt", arrays)
    for path in tmp_path.iterdir():
        size = int(keep) if keep >= 1 else int(path.stat().st_size * keep)
        path.write_bytes(path.read_bytes()[:size])
    refused(source, model, "not readable as a checkpoint|missing")


def test_foreign_file_and_absent_file(model: object, tmp_path: Path) -> None:
    (tmp_path / "notes.ckpt").write_text("these are not weights\n" * 50)
    refused(str(tmp_path / "notes.ckpt"), model, "not readable as a checkpoint")
    refused(str(tmp_path / "absent.ckpt"), model, "no such checkpoint")


def test_checkpoint_of_another_network(model: object, tmp_path: Path) -> None:
    refused(write_v2(tmp_path / "m.ckpt", {"vgg_16/conv1/conv1_1/weights": np.zeros((3, 3, 3, 64), np.float32)}),
            model, "missing")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(bad: float, model: object, arrays: dict[str, np.ndarray],
                                              tmp_path: Path) -> None:
    broken = {**arrays, f"{NAME}/conv1/biases": np.full(64, bad, np.float32)}
    refused(write_v2(tmp_path / "m.ckpt", broken), model, r"NaN or infinite.*resnet_v2_18\.conv1/bias")


# --- classes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [1000, 1001])
def test_classes_are_told_from_the_checkpoint(classes: int, tmp_path: Path) -> None:
    source = write_v2(tmp_path / "m.ckpt", {f"net/{NAME}/logits/biases": np.zeros(classes, np.float32)})
    assert weights.checkpoint_classes(source, catalog.find(NAME)) == classes


def test_background_class_is_dropped_from_every_head(tmp_path: Path) -> None:
    built = networks.build(catalog.configure("inception_v3", (107, 107), 4, {"drop_background": "true"}))
    shapes = {n: tuple(v.shape) for n, v in weights.slim_variables(built).items()}
    heads = [n for n in shapes if "Conv2d_1c_1x1" in n or ("Conv2d_2b_1x1" in n and "Aux" in n)]
    assert len(heads) == 4
    rng = np.random.default_rng(1)
    stored = {n: rng.random((*s[:-1], 5) if n in heads else s, np.float32) for n, s in shapes.items()}
    dropped = catalog.configure("inception_v3", (107, 107), 4, {"drop_background": "true"})
    weights.load(built, dropped, write_v2(tmp_path / "m.ckpt", stored), 0)
    assert same(values(built), {n: a[..., 1:] if n in heads else a for n, a in stored.items()})


def test_heads_switched_off_leave_their_variables_unused(tmp_path: Path) -> None:
    whole = networks.build(catalog.configure("inception_v3", (107, 107), 4))
    weights.load(whole, catalog.configure("inception_v3", (107, 107), 4), "random", 0)
    stored = values(whole)
    source = write_v2(tmp_path / "m.ckpt", stored)
    for options in ({"aux_logits": "false"}, {"include_top": "false"}):
        smaller = catalog.configure("inception_v3", (107, 107), 4, options)
        built = networks.build(smaller)
        weights.load(built, smaller, source, 0)
        found = values(built)
        assert same(found, {n: a for n, a in stored.items() if n in found})


# --- Keras files and applications ----------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_keras_files(suffix: str, model: object, tmp_path: Path) -> None:
    weights.load(model, config(), "random", 3)  # type: ignore[arg-type]
    path = tmp_path / f"saved{suffix}"
    (model.save if suffix == ".keras" else model.save_weights)(path)  # type: ignore[attr-defined]
    fresh = networks.build(config())
    weights.load(fresh, config(), str(path), 0)
    assert same(values(fresh), values(model))


def test_keras_file_of_another_network(model: object, tmp_path: Path) -> None:
    other = networks.build(catalog.configure("alexnet", (57, 57), 3, {"include_top": "false"}))
    other.save_weights(tmp_path / "other.weights.h5")
    refused(str(tmp_path / "other.weights.h5"), model, "do not fit")
    (tmp_path / "bad.weights.h5").write_bytes(b"not a file of weights")
    refused(str(tmp_path / "bad.weights.h5"), model, "do not fit")
    refused(str(tmp_path / "absent.weights.h5"), model, "no such file")


@pytest.mark.parametrize(("name", "options", "arguments", "end"), [
    ("inception_v3", {"aux_logits": "false"}, {"input_shape": (139, 139, 3), "include_top": True}, "predictions"),
    ("vgg_16", {"include_top": "false"}, {"input_shape": (64, 64, 3), "include_top": False}, "pool5"),
    ("vgg_19", {"include_top": "false"}, {"input_shape": (64, 64, 3), "include_top": False}, "pool5")])
def test_applications_weights_give_the_applications_output(name: str, options: dict[str, str],
                                                           arguments: dict[str, object], end: str) -> None:
    import keras

    keras.utils.set_random_seed(5)
    spec = catalog.find(name)
    assert spec.imagenet is not None
    source = getattr(keras.applications, spec.imagenet[0])(weights=None, **arguments)
    for variable in source.weights:
        if "moving" in variable.name or variable.name in ("beta", "bias"):
            variable.assign(np.random.default_rng(1).uniform(0.2, 0.9, variable.shape))
    size = arguments["input_shape"][:2]  # type: ignore[index]
    built_config = catalog.configure(name, size, 1000, options)
    built = networks.build(built_config)
    weights.assign(built, built_config, weights.application_variables(built, source, spec))
    images = np.random.default_rng(2).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    found, expected = np.asarray(built(images)[end]), np.asarray(source(images))
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


def test_vgg_dense_kernel_is_the_7x7_convolution() -> None:
    import keras

    source = keras.Sequential([keras.Input((7 * 7 * 512,)), keras.layers.Dense(4)])
    target = keras.Sequential([keras.Input((7, 7, 512)), keras.layers.Conv2D(4, 7, name="vgg_16.fc6")])
    weights_ = weights.application_variables(target, source, catalog.find("vgg_16"))
    target.layers[0].kernel.assign(weights_.read("vgg_16/fc6/weights"))
    x = np.random.default_rng(0).random((2, 7, 7, 512), np.float32)
    np.testing.assert_allclose(target(x)[:, 0, 0], source(x.reshape(2, -1)), rtol=1e-4)


def test_imagenet_is_refused_with_the_reason_and_the_way_out() -> None:
    built_config = catalog.configure("resnet_v2_50", (32, 32), 1000)
    with pytest.raises(WeightsError, match=r"epsilon.*keras\.applications:ResNet50V2"):
        weights.load(networks.build(built_config), built_config, "imagenet", 0)
    dropped = catalog.configure("inception_v3", (107, 107), 1000, {"drop_background": "true"})
    with pytest.raises(UsageError, match="no background class"):
        weights.load(networks.build(dropped), dropped, "imagenet", 0)


def test_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    def offline(**_: object) -> None:
        raise OSError("URL fetch failure:\n[Errno -2] Name or service not known")

    monkeypatch.setattr(keras.applications, "InceptionV3", offline)
    plain = catalog.configure("inception_v3", (107, 107), 1000, {"aux_logits": "false"})
    with pytest.raises(WeightsError, match="download failed") as caught:
        weights.load(networks.build(plain), plain, "imagenet", 0)
    assert "\n" not in str(caught.value)


# --- random --------------------------------------------------------------------------------------------------------

def draws(name: str, seed: int, count: int) -> np.ndarray:
    """NumPy's float32 draws, by the definition of its generator: the upper 24 bits of each 32, low half first."""
    bits = np.random.PCG64([zlib.crc32(name.encode()), seed])
    words = [part for raw in bits.random_raw(-(-count // 2)) for part in (int(raw) & 0xFFFFFFFF, int(raw) >> 32)]
    return np.array([(word >> 8) * 2.0 ** -24 for word in words[:count]], np.float32)


def test_random_values_follow_from_name_and_seed_alone(model: object) -> None:
    weights.load(model, config(), "random", 7)  # type: ignore[arg-type]
    found = values(model)
    name = f"{NAME}/conv1/weights"
    limit = np.float32(np.sqrt(6 / (7 * 7 * 3)))  # variance 2 / fan_in of a uniform distribution
    expected = (draws(name, 7, 7 * 7 * 3 * 64) * np.float32(2) - np.float32(1)) * limit
    assert np.array_equal(found[name].reshape(-1), expected)
    assert found[f"{NAME}/postnorm/gamma"].min() >= 0.9
    assert not np.array_equal(found[f"{NAME}/postnorm/gamma"], found[f"{NAME}/postnorm/moving_variance"])


def test_seed_and_fingerprint(model: object) -> None:
    prints = []
    for seed in (0, 0, 1):
        weights.load(model, config(), "random", seed)  # type: ignore[arg-type]
        prints.append(weights.fingerprint(model))  # type: ignore[arg-type]
    assert prints[0] == prints[1] != prints[2]
    assert re.fullmatch(r"[0-9a-f]{64}", prints[0])
