"""Every network against its original, end to end: weights by name, shapes, numbers, and a clean graph.

Each network is built and converted once, with every end point as an output; the tests read what that run recorded.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import keras
import numpy as np
import onnxruntime
import pytest

from export import catalog, checks, convert, graph, networks, weights
from export.catalog import NetworkConfig
from export.checks import Comparison, EndPoint
from export.cost import Cost, cost
from tests.golden.reference import CASES, summary

TOLERANCE = 1e-4
# 13, 16c and 19 differ from the VGGs of CASES in their convolutions only
RANDOM = {
    "vgg_11_lrn": {}, "vgg_13": {"include_top": "false"}, "vgg_16c": {"include_top": "false"},
    "vgg_19": {"include_top": "false"}, "resnet_v2_18": {}, "resnet_v2_34": {}, "resnet_v2_101": {},
    "resnet_v2_200": {},
}

# counted by hand from the papers' tables: one Conv a convolution, a BatchNormalization for each pre-activation and
# the last norm (the norms inside a unit follow a convolution and fold), one Gemm a dense layer, one Transpose
OPERATIONS: dict[str, dict[str, int]] = {
    "alexnet": {"Transpose": 1, "Conv": 5, "Relu": 7, "LRN": 2, "MaxPool": 3, "Reshape": 1, "Gemm": 3},
    "alexnet_no_lrn": {"Transpose": 1, "Conv": 5, "Relu": 7, "MaxPool": 3, "Reshape": 1, "Gemm": 3},
    "vgg_11": {"Transpose": 1, "Conv": 11, "Relu": 10, "MaxPool": 5, "Reshape": 1},
    "vgg_11_lrn": {"Transpose": 1, "Conv": 11, "Relu": 10, "MaxPool": 5, "Reshape": 1, "LRN": 1},
    # without the top, `pool5` is the output, in NHWC
    "vgg_13": {"Transpose": 2, "Conv": 10, "Relu": 10, "MaxPool": 5},
    "vgg_16c": {"Transpose": 2, "Conv": 13, "Relu": 13, "MaxPool": 5},
    "vgg_16": {"Transpose": 1, "Conv": 16, "Relu": 15, "MaxPool": 5, "Reshape": 1},
    "vgg_19": {"Transpose": 2, "Conv": 16, "Relu": 16, "MaxPool": 5},
    "inception_v3": {"Transpose": 1, "Conv": 95, "Relu": 94, "MaxPool": 4, "AveragePool": 9, "Concat": 15,
                     "ReduceMean": 1, "Reshape": 1},
    "inception_resnet_v1": {"Transpose": 1, "Conv": 132, "Relu": 131, "MaxPool": 3, "Concat": 23, "Add": 21,
                            "ReduceMean": 1, "Gemm": 1},
    # convolutions: stem, 3 (or 2) a unit, a shortcut for each of the blocks that change width, logits
    "resnet_v2_18": {"Transpose": 1, "Conv": 1 + 16 + 3 + 1, "BatchNormalization": 9, "Relu": 17, "Add": 8,
                     "MaxPool": 4, "ReduceMean": 1, "Reshape": 1},
    "resnet_v2_34": {"Transpose": 1, "Conv": 1 + 32 + 3 + 1, "BatchNormalization": 17, "Relu": 33, "Add": 16,
                     "MaxPool": 4, "ReduceMean": 1, "Reshape": 1},
    "resnet_v2_50": {"Transpose": 1, "Conv": 1 + 48 + 4 + 1, "BatchNormalization": 17, "Relu": 49, "Add": 16,
                     "MaxPool": 4, "ReduceMean": 1, "Reshape": 1},
    "resnet_v2_101": {"Transpose": 1, "Conv": 1 + 99 + 4 + 1, "BatchNormalization": 34, "Relu": 100, "Add": 33,
                      "MaxPool": 4, "ReduceMean": 1, "Reshape": 1},
    "resnet_v2_152": {"Transpose": 1, "Conv": 1 + 150 + 4 + 1, "BatchNormalization": 51, "Relu": 151, "Add": 50,
                      "MaxPool": 4, "ReduceMean": 1, "Reshape": 1},
    "resnet_v2_200": {"Transpose": 1, "Conv": 1 + 198 + 4 + 1, "BatchNormalization": 67, "Relu": 199, "Add": 66,
                      "MaxPool": 4, "ReduceMean": 1, "Reshape": 1},
    # no pooling at the end; block1 and block2 keep their strides, block3's becomes a dilation
    "resnet_v2_50_dense_stride16": {"Transpose": 2, "Conv": 54, "BatchNormalization": 17, "Relu": 49, "Add": 16,
                                    "MaxPool": 3},
}


@dataclass(frozen=True)
class Run:
    """What one build and one conversion of a network gave."""

    config: NetworkConfig
    table: list[EndPoint]
    keras: dict[str, np.ndarray]
    onnx: dict[str, np.ndarray]
    comparisons: list[Comparison]
    operations: Counter[str]
    variables: dict[str, tuple[int, ...]]
    cost: Cost


@cache
def run_of(name: str) -> Run:
    """The one run of a network; what it holds is small, the model and its files are gone when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        run = convert_all(name, Path(folder))
    keras.backend.clear_session()
    return run


def convert_all(name: str, folder: Path) -> Run:
    case = CASES.get(name)
    config = case.config if case else catalog.configure(name, options=RANDOM[name])
    model = networks.build(config)
    if case:
        weights.assign(model, config, case.variables)
    else:
        weights.load(model, config, "random", 0)
    ends = [config.default_output, *(case.stats if case else ())]
    raw = convert.to_onnx(model, None, 18)
    graph.clean(raw)
    shapes = {end: tuple(tensor.shape) for end, tensor in model.output.items()}
    table = checks.shape_table(raw, shapes, catalog.declared_shapes(config), None)
    plain = raw.clone()
    path, alone = folder / "ends.onnx", folder / "model.onnx"
    for one, outputs, file in ((raw, ends, path), (plain, ends[:1], alone)):
        graph.finish(one, outputs, None, False)
        checks.infer_shapes(one)
        graph.save(one, file, {"enginesmith.network": name})
    checks.check_file(str(alone))
    images = case.images if case else checks.seeded_inputs(plain, 1, 0)["images"]
    truth = {end: np.asarray(value) for end, value in model(images, training=False).items() if end in ends}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = dict(zip(ends, session.run(ends, {"images": images}), strict=True))
    comparisons = checks.compare(str(alone), [({"images": images}, {ends[0]: truth[ends[0]]})])
    variables = {variable: tuple(v.shape) for variable, v in weights.slim_variables(model).items()}
    return Run(config, table, truth, found, comparisons, Counter(n.op_type for n in plain.graph), variables,
               cost(plain))


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_agree_three_ways(name: str) -> None:
    found = run_of(name)
    assert len(found.table) >= 5
    assert all(row.declared == row.keras == row.onnx for row in found.table)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    assert dict(run_of(name).operations) == OPERATIONS[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_onnx_equals_keras(name: str) -> None:
    found = run_of(name)
    assert {row.optimizations for row in found.comparisons} == {"on", "off"}
    assert all(row.relative_l2 < 1e-5 and row.top1_agreement == 1 for row in found.comparisons)
    assert np.std(found.keras[found.config.default_output]) > 1e-3  # the comparison has something to compare


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_original(name: str) -> None:
    found, expected = run_of(name), CASES[name].arrays["logits"]
    for source in (found.keras, found.onnx):
        assert relative_l2(source["logits"].reshape(expected.shape), expected) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_end_points_equal_the_original(name: str) -> None:
    found, case = run_of(name), CASES[name]
    assert case.stats
    for end, stats in case.stats.items():
        for source in (found.keras, found.onnx):
            scale = np.abs(stats).max()
            np.testing.assert_allclose(summary(source[end]), stats, rtol=TOLERANCE, atol=TOLERANCE * scale)
        assert found.keras[end].size == np.prod(case.arrays[f"shape/{end}"])


@pytest.mark.parametrize("name", CASES)
def test_variables_are_the_originals(name: str) -> None:
    assert run_of(name).variables == CASES[name].shapes


@pytest.mark.parametrize("name", RANDOM)
def test_random_weights_keep_activations_in_range(name: str) -> None:
    found = run_of(name)
    assert 0.01 < np.std(found.keras[found.config.default_output]) < 100


README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", [name for name, options in RANDOM.items() if not options])
def test_readme_tells_parameters_and_gflops(name: str) -> None:
    found = run_of(name).cost
    (row,) = (line for line in README.splitlines() if line.startswith(f"| {name} "))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4:6] == [f"{found.parameters / 1e6:.2f}", f"{found.gflops:.2f}"]


# --- options and training-only parts -----------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "size", "classes", "options"), [
    ("alexnet", (63, 95), 7, {"include_top": "false"}),
    ("inception_v3", (139, 107), 7, {}),
    ("inception_v3", (75, 96), 7, {"aux_logits": "false"}),
    ("inception_v3", (75, 75), None, {"include_top": "false"}),
    ("resnet_v2_18", (1, 1), 7, {}),
    ("resnet_v2_50", (97, 65), 7, {"output_stride": "8"}),
    ("resnet_v2_50", (65, 33), 7, {"output_stride": "16", "global_pool": "false", "include_root_block": "false"}),
    ("resnet_v2_34", (64, 64), 7, {"output_stride": "32", "drop_background": "true"}),
    ("inception_resnet_v1", (75, 99), None, {"embedding": "512", "normalize": "true"}),
    ("inception_resnet_v1", (96, 96), 11, {}),
])
def test_options_build_what_the_catalog_declares(name: str, size: tuple[int, int], classes: int | None,
                                                 options: dict[str, str]) -> None:
    config = catalog.configure(name, size, classes, options)
    model = networks.build(config)
    assert {end: tuple(v.shape) for end, v in model.output.items()} == catalog.declared_shapes(config)
    assert config.default_output in model.output


@pytest.mark.parametrize(("name", "options", "edge"), [
    ("alexnet", {}, 57), ("vgg_11", {}, 224), ("vgg_13", {"include_top": "false"}, 32), ("inception_v3", {}, 107),
    ("inception_v3", {"aux_logits": "false"}, 75), ("resnet_v2_18", {}, 1), ("inception_resnet_v1", {}, 75)])
def test_smallest_size(name: str, options: dict[str, str], edge: int) -> None:
    config = catalog.configure(name, options=options)
    assert catalog.smallest_size(config) == (edge, edge)


@pytest.mark.parametrize(("name", "options", "edge"), [
    ("vgg_13", {"include_top": "false"}, 32), ("inception_resnet_v1", {}, 75)])
def test_keras_itself_refuses_one_pixel_less(name: str, options: dict[str, str], edge: int) -> None:
    spec = catalog.configure(name, options=options)
    networks.build(catalog.NetworkConfig(spec.spec, (edge, edge), spec.classes, spec.options))
    with pytest.raises(ValueError, match=r"dimension|negative|size"):
        networks.build(catalog.NetworkConfig(spec.spec, (edge - 1, edge - 1), spec.classes, spec.options))


def test_training_parts_of_resnet() -> None:
    model = networks.build(catalog.configure("resnet_v2_18", (32, 32), 7))
    norm = model.get_layer("resnet_v2_18.postnorm")
    assert (norm.momentum, norm.epsilon, norm.scale) == (0.997, 1e-5, True)
    # TF-Slim's decay is for half the sum of squares
    assert float(model.get_layer("resnet_v2_18.logits").kernel_regularizer.l2) == pytest.approx(0.5e-4)


def test_training_parts_of_inception() -> None:
    model = networks.build(catalog.configure("inception_v3", (107, 107), 7))
    norm = model.get_layer("InceptionV3.Conv2d_1a_3x3.BatchNorm")
    assert (norm.momentum, norm.epsilon, norm.scale) == (0.9997, 1e-3, False)
    assert model.get_layer("InceptionV3.Dropout_1b").rate == pytest.approx(0.2)  # TF-Slim keeps 0.8
    assert float(model.get_layer("InceptionV3.Logits.Conv2d_1c_1x1").kernel_regularizer.l2) == pytest.approx(2e-5)


def test_training_parts_of_facenet_and_alexnet() -> None:
    facenet = networks.build(catalog.configure("inception_resnet_v1", (75, 75)))
    norm = facenet.get_layer("InceptionResnetV1.Bottleneck.BatchNorm")
    assert (norm.momentum, norm.epsilon, norm.scale) == (0.995, 1e-3, False)
    alexnet = networks.build(catalog.configure("alexnet", (57, 57), 7))
    assert [alexnet.get_layer(f"alexnet.dropout{n}").rate for n in (6, 7)] == [0.5, 0.5]


def test_a_saved_network_loads_without_enginesmith_code_in_the_file(tmp_path: Path) -> None:

    model = networks.build(catalog.configure("alexnet", (57, 57), 7, {"include_top": "false"}))
    model.save(tmp_path / "alexnet.keras")
    loaded = keras.saving.load_model(tmp_path / "alexnet.keras")
    images = np.random.default_rng(0).uniform(-1, 1, (2, 57, 57, 3)).astype(np.float32)
    np.testing.assert_allclose(loaded(images)["pool5"], model(images)["pool5"], rtol=1e-6, atol=1e-6)
