"""Models of users, from Keras to the cleaned graph and ONNX Runtime: same shapes, same numbers, no leftovers."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export import checks
from tests.export.small import MODELS, convert_small


@pytest.mark.parametrize("name", MODELS)
def test_users_model(name: str, tmp_path: Path) -> None:
    small = MODELS[name]
    found = convert_small(small.build(), tmp_path / "m.onnx")
    checks.check_shapes(found.table, ())
    assert max(c.relative_l2 for c in found.comparisons) < 1e-5
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in (*graph.input, *graph.output)} == {"batch"}
    assert found.operations.pop("Transpose", 0) == small.transposes
    if name != "same_tensor_twice":
        assert not found.operations["Identity"]
    if small.operations is not None:
        assert found.operations == small.operations


@pytest.mark.parametrize("name", ["separable", "flatten", "pads", "squeeze_excite", "softmax_map", "layer_norm"])
@pytest.mark.parametrize("opset", [14, 15, 17])
def test_earlier_opsets(name: str, opset: int, tmp_path: Path) -> None:
    found = convert_small(MODELS[name].build(), tmp_path / "m.onnx", opset=opset)
    checks.check_shapes(found.table, ())
    assert max(c.relative_l2 for c in found.comparisons) < 1e-5
    assert found.operations["Transpose"] == MODELS[name].transposes
    assert {o.version for o in onnx.load(tmp_path / "m.onnx").opset_import if o.domain == ""} == {opset}


@pytest.mark.parametrize("name", ["flatten", "group_norm", "attention", "two_inputs"])
def test_fixed_batch(name: str, tmp_path: Path) -> None:
    found = convert_small(MODELS[name].build(), tmp_path / "m.onnx", batch=4)
    assert all(row.onnx is not None and row.onnx[0] == 4 for row in found.table)
    assert max(c.relative_l2 for c in found.comparisons) < 1e-5


@pytest.mark.parametrize("name", ["separable", "flatten", "rescaled", "permute", "same_tensor_twice", "squeeze_excite"])
@pytest.mark.parametrize(("normalisation", "channels_first"),
                         [("caffe", False), ("facenet", True), ("torch", True), (None, True), ("rgb_mean", False)])
def test_interface(name: str, normalisation: str | None, channels_first: bool, tmp_path: Path) -> None:
    found = convert_small(MODELS[name].build(), tmp_path / "m.onnx", normalisation=normalisation,
                          channels_first=channels_first)
    assert max(c.relative_l2 for c in found.comparisons) < 1e-4
    fed = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type
    assert fed.elem_type == (onnx.TensorProto.UINT8 if normalisation else onnx.TensorProto.FLOAT)
    assert [d.dim_value for d in fed.shape.dim[1:]] == ([3, 16, 16] if channels_first else [16, 16, 3])
    if channels_first and name in ("separable", "squeeze_excite"):
        assert not found.operations["Transpose"]


@pytest.mark.parametrize("name", ["separable", "attention", "lstm"])
def test_same_model_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    model = MODELS[name].build()
    first, second = (convert_small(model, tmp_path / f"{i}.onnx").data for i in range(2))
    assert first == second


def test_no_dead_weight_and_names_from_the_layers(tmp_path: Path) -> None:
    convert_small(MODELS["flatten"].build(), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    read = {name for node in graph.node for name in node.input}
    assert {w.name for w in graph.initializer} <= read
    assert len({node.name for node in graph.node}) == len(graph.node)
    conv = next(node for node in graph.node if node.op_type == "Conv")
    assert conv.input[1] == f"{conv.name}/weights"
