"""Engines side by side on the CPU: ours in every runtime and precision, and the same network as others export it.

    python -m benchmarks.engines [--networks resnet_v2_152,inception_v3] [--batches 1,8] [--rounds 5] [--steps 5]

Every contestant is one process; all of them are alive, and take turns, `--steps` runs each, `--rounds` times, with a
float32 matrix product in each round as the machine's rate. A ratio is the median over the rounds of two
contestants' medians in the same round. Numbers are wall milliseconds for a whole batch, inputs and outputs in host
memory. onnxslim is optional: those rows are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import described, save
from benchmarks.export import theirs
from engines.runtime import BuildRequest, Profile
from engines.worker import Worker
from pipeline import build as build_stage
from pipeline import verify as verify_stage
from pipeline.export import ExportRequest, export

MATRIX = 2048
OURS = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "bf16"),
        ("openvino", "int8"), ("tensorflow", "fp32"), ("tensorflow-xla", "fp32"))


def foreign(network: str, folder: Path) -> dict[str, Path]:
    """The network as tf2onnx and Keras export it, and each of them through onnxslim."""
    found = {}
    for method in ("tf2onnx", "keras"):
        path = folder / f"{method}.onnx"
        done = subprocess.run([sys.executable, "-m", "benchmarks.engines", "--foreign", method, network, str(path)],
                              capture_output=True, check=False)
        if done.returncode:
            print(f"{network} by {method}: ended with {done.returncode}", flush=True)
            continue
        found[method] = path
        with contextlib.suppress(ImportError):
            import onnx
            import onnxslim

            slim = folder / f"{method}-slim.onnx"
            onnx.save(onnxslim.slim(str(path)), slim)
            found[f"{method}+onnxslim"] = slim
    return found


def requests(network: str, folder: Path, batches: list[int]) -> tuple[dict[str, BuildRequest], dict[str, Any]]:
    """Contestant -> what is built for it; and our build and cached build times in seconds."""
    result = export(ExportRequest(network, folder, saved_model=True))
    wish = build_stage.Request(network, folder, tuple(dict.fromkeys(r for r, _ in OURS)), ("fp32", "bf16", "int8"),
                               profiles=(Profile(1, min(batches), max(batches)),))
    times = {}
    for name in ("build_seconds", "cached_build_seconds"):
        start = time.perf_counter()
        built = build_stage.build(wish)
        times[name] = round(time.perf_counter() - start, 2)
    files = {"int8": "model.int8.onnx"}
    found = {f"ours {r.runtime} {r.precision}":
             BuildRequest(built.folder / files.get(r.precision, "model.onnx"), r.runtime, r.precision,
                          profiles=wish.profiles)
             for r in built.rows if (r.runtime, r.precision) in OURS}
    for name, path in foreign(network, folder).items():
        found[f"{name} onnxruntime fp32"] = BuildRequest(path, "onnxruntime")
    return found, {**times, "gflops": result.manifest["cost"]["gflops"], "folder": built.folder}


def matrix_product(path: Path) -> BuildRequest:
    """A float32 product of two matrices of MATRIX x MATRIX in ONNX Runtime; NumPy is slower here."""
    from onnx import TensorProto, helper, save

    both = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [MATRIX, MATRIX]) for name in "ab"]
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [MATRIX, MATRIX])
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", both, [out])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return BuildRequest(path, "onnxruntime")


def measure(network: str, batches: list[int], rounds: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        contestants, known = requests(network, Path(temporary), batches)
        inputs, expected = verify_stage.load_reference(known.pop("folder") / "reference.npz")
        workers = {}
        for name, request in contestants.items():
            workers[name] = stack.enter_context(Worker(request))
            workers[name].build()
        product = stack.enter_context(Worker(matrix_product(Path(temporary) / "product.onnx")))
        product.build()
        product.prepare({name: np.random.default_rng(0).random((MATRIX, MATRIX), np.float32) for name in "ab"})
        result: dict[str, Any] = {"network": network, **known, "batches": {}}
        for batch in batches:
            rows, truth = (next(iter(a.values()))[np.arange(batch) % 4] for a in (inputs, expected))
            errors = {}
            for name, worker in workers.items():
                (feed,) = inputs if name.startswith("ours") else ("images",)
                found = next(iter(worker.prepare({feed: rows}).values())).reshape(truth.shape)
                errors[name] = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
                worker.time(2)
            samples: dict[str, list[list[int]]] = {name: [] for name in workers}
            rates = []
            for _ in range(rounds):
                time.sleep(0.1)
                rates.append(2 * MATRIX ** 3 / min(product.time(5).wall))  # operations in a nanosecond: GFLOP/s
                for name, worker in workers.items():
                    time.sleep(0.1)  # thread pools of the one before spin on for a while
                    worker.time(1)
                    samples[name].append(worker.time(steps).wall)
            result["batches"][batch] = summary(network, batch, samples, errors, rates, known["gflops"])
        result["peak_mb"] = {name: worker.peak_bytes() / 1e6 for name, worker in workers.items()}
    return result


def summary(network: str, batch: int, samples: dict[str, list[list[int]]], errors: dict[str, float],
            rates: list[float], gflops: float) -> dict[str, Any]:
    base = [statistics.median(r) for r in samples["ours onnxruntime fp32"]]
    rows = {}
    for name, found in samples.items():
        medians = [statistics.median(r) for r in found]
        ratio = statistics.median(b / m for b, m in zip(base, medians, strict=True))
        share = statistics.median(gflops * batch * 1e9 / m / rate for m, rate in zip(medians, rates, strict=True))
        rows[name] = {"median_ms": statistics.median(medians) / 1e6, "speed_to_ours_fp32": round(ratio, 3),
                      "share_of_matrix_rate": round(share, 3), "relative_l2": errors[name],
                      "samples_ns": found}
        print(f"{network} batch {batch}: {name:32s} {rows[name]['median_ms']:8.1f} ms   {ratio:5.2f} x ours fp32   "
              f"{share:5.2f} of the matrix rate   relative L2 {errors[name]:.1e}", flush=True)
    return {"matrix_gflops": rates, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--foreign", nargs=3, metavar=("METHOD", "NETWORK", "PATH"))
    parser.add_argument("--networks", default="resnet_v2_152,inception_v3")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines.json"))
    asked = parser.parse_args()
    if asked.foreign:
        method, network, path = asked.foreign
        _, made = theirs(network, Path(path).parent, method)
        made.replace(path)
        return
    result: dict[str, Any] = described("engines") | {"networks": []}
    for network in asked.networks.split(","):
        result["networks"].append(measure(network, [int(b) for b in asked.batches.split(",")], asked.rounds,
                                          asked.steps))
        print(f"{network}: build {result['networks'][-1]['build_seconds']} s, cached "
              f"{result['networks'][-1]['cached_build_seconds']} s", flush=True)
        save(asked.out, result)


if __name__ == "__main__":
    main()
