"""Small ONNX models for engine tests, made by hand so that no exporter takes part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def convolution(path: Path, batch: int | str = "batch", channels: int = 16, before: int = 0) -> Path:
    """images (batch, 3, 8, 8) -> Conv 3x3, Relu, mean, Gemm -> scores (batch, 5); `before`: more 1x1 Convs in front."""
    rng = np.random.default_rng(0)
    weights = {"k": rng.normal(0, 0.3, (channels, 3, 3, 3)), "b": rng.normal(0, 0.3, channels),
               "w": rng.normal(0, 0.3, (channels, 5)), "c": rng.normal(0, 0.3, 5)}
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
    weights |= {f"p{i}": rng.normal(0, 0.6, (3, 3, 1, 1)) for i in range(before)}
    chain = ["images", *(f"before{i}" for i in range(before))]
    nodes = [helper.make_node("Conv", [chain[i], f"p{i}"], [chain[i + 1]], chain[i + 1]) for i in range(before)]
    nodes += [helper.make_node("Conv", [chain[-1], "k", "b"], ["conv"], "first", pads=[1, 1, 1, 1]),
             helper.make_node("Relu", ["conv"], ["relu"], "relu"),
             helper.make_node("ReduceMean", ["relu", "axes"], ["mean"], "mean", keepdims=0),
             helper.make_node("Gemm", ["mean", "w", "c"], ["scores"], "last")]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 5])],
        [*(numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()), axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def images(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(seed).random((batch, 3, 8, 8), np.float32)}


def expected(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """By ONNX's reference evaluator, which no engine uses."""
    from onnx.reference import ReferenceEvaluator

    return np.asarray(ReferenceEvaluator(str(path)).run(None, feeds)[0])
