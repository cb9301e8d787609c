"""The roofline of this machine: the best rate of arithmetic in each precision, and the memory's bandwidth.

Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore architectures", CACM
2009. The rate is that of the faster of a matrix product and a 3x3 convolution, both large, in the runtimes that were
measured themselves; the bandwidth is that of a copy by all cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.errors import EngineError
from engines.runtime import BuildRequest, Profile, backend
from engines.worker import Worker
from export import precision as variants
from pipeline import environment
from pipeline.record import Limit

SIZES = {"cpu": (2048, 56), "gpu": (8192, 224)}  # edge of the matrices; height and width of the images
CHANNELS = 256
TRIES = 20
COPIED = 1 << 28  # bytes


def measure(precisions: Sequence[str], runtimes: Sequence[str], device: str) -> tuple[tuple[Limit, ...], float]:
    """The best rate of each precision in floating point (or integer) operations per second, and bytes per second."""
    rates = (_best(precision, sorted({r for r in runtimes if not r.startswith("tensorflow")}), device)
             for precision in precisions)
    bandwidth = _bandwidth() if device == "cpu" else _gpu_bandwidth(device)
    return tuple(rate for rate in rates if rate is not None), bandwidth


def _best(precision: str, runtimes: Sequence[str], device: str) -> Limit | None:
    edge, pixels = SIZES["cpu" if device == "cpu" else "gpu"]
    found = []
    with TemporaryDirectory() as folder:
        for model, feed, operations in (_product(Path(folder), edge), _convolution(Path(folder), pixels)):
            for runtime in runtimes:
                try:
                    seconds = _seconds(model, feed, runtime, precision, device)
                except EngineError:  # this runtime has no such operation in this precision: another sets the limit
                    continue
                found.append(Limit(precision, operations / seconds, runtime))
    return max(found, key=lambda limit: limit.flops_per_second, default=None)


def _seconds(model: Path, feed: np.ndarray, runtime: str, precision: str, device: str) -> float:
    """The shortest of a few runs."""
    form = backend(runtime).variant(precision, device)
    if form is None:
        raise EngineError(runtime, f"has no {precision}")
    made = model if not form else model.with_name(f"{model.stem}.{form}.onnx")
    if not made.exists():
        if form.startswith("int8"):
            variants.to_int8(model, made, form, {"x": feed})
        elif form == "fp8":
            variants.to_fp8(model, made, {"x": feed})
        else:
            variants.to_half(model, made, form)
    with Worker(BuildRequest(made, runtime, precision, device, (Profile(1, 1, 1),))) as worker:
        built = worker.build()
        if not built.layers.get(precision):
            raise EngineError(runtime, f"computes no {precision} here")
        worker.prepare({"x": feed})
        return min(worker.time(TRIES).wall) / 1e9


def _product(folder: Path, edge: int) -> tuple[Path, np.ndarray, int]:
    weights = np.random.default_rng(0).standard_normal((edge, edge), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    return _saved(folder / "product.onnx", node, weights, (edge, edge), (edge, edge)), weights, 2 * edge ** 3


def _convolution(folder: Path, pixels: int) -> tuple[Path, np.ndarray, int]:
    rng, shape = np.random.default_rng(0), (1, CHANNELS, pixels, pixels)
    weights = rng.standard_normal((CHANNELS, CHANNELS, 3, 3), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "convolution", pads=[1, 1, 1, 1])
    path = _saved(folder / "convolution.onnx", node, weights, shape, shape)
    return path, rng.standard_normal(shape, np.float32), 2 * 9 * CHANNELS ** 2 * pixels ** 2


def _saved(path: Path, node: onnx.NodeProto, weights: np.ndarray, fed: tuple[int, ...], out: tuple[int, ...]) -> Path:
    graph = helper.make_graph(
        [node], "limit", [helper.make_tensor_value_info("x", TensorProto.FLOAT, fed)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def _bandwidth() -> float:
    """Of a copy by all cores, what is read and what is written both counted."""
    cores = len(environment.affinity())
    source = np.ones((cores, COPIED // cores), np.uint8)
    target = np.empty_like(source)
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(TRIES):
            start = perf_counter()
            list(pool.map(np.copyto, target, source))
            best = min(best, perf_counter() - start)
    return 2 * source.nbytes / best


def _gpu_bandwidth(device: str) -> float:
    """Of a copy within the GPU's memory."""
    from engines.trt import copy_seconds

    return 2 * COPIED / min(copy_seconds(device, COPIED, TRIES))
