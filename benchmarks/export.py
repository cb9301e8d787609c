"""Conversion side by side: ours, ours with every check, `tf2onnx.convert.from_function`, `keras.Model.export`.

    python -m benchmarks.export [--networks resnet_v2_50,resnet_v2_152,vgg_16] [--depths 50,101,152,200] [--rounds 3]
                                [--out FILE]

The methods take turns, `--rounds` times. Every sample is a fresh process that loads TensorFlow and builds the network
with the same random weights first; that part is not counted in `seconds`, but its memory is in `peak_mb`, the largest
resident size of the process. A ratio is the median over the rounds of ours to tf2onnx in the same round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import described, save

METHODS = ("ours", "ours+checks", "tf2onnx", "keras")
BEFORE = ("load TensorFlow", "load model")
UNITS = {"50": 16, "101": 33, "152": 50, "200": 66}


def ours(network: str, folder: Path, checks: bool) -> tuple[float, Path]:
    from pipeline.export import ExportRequest, export

    result = export(ExportRequest(network, folder, checks=checks))
    seconds = sum(s for step, s in result.manifest["seconds"].items() if step not in BEFORE)
    return seconds, result.folder / "model.onnx"


def theirs(network: str, folder: Path, method: str) -> tuple[float, Path]:
    from export import catalog, networks, weights
    from export.quiet import load_tensorflow

    load_tensorflow()
    import keras
    import tensorflow as tf
    import tf2onnx

    config = catalog.configure(network)
    whole = networks.build(config)
    weights.load(whole, config, "random", 0)
    model = keras.Model(whole.input, whole.output["logits"])
    path = folder / "model.onnx"
    model(tf.zeros((1, *config.size, 3)))  # keras.Model.export fails on a model that was never called
    start = time.perf_counter()
    if method == "keras":
        model.export(path, format="onnx", verbose=False)
    else:
        spec = tf.TensorSpec((None, *config.size, 3), tf.float32, name="images")
        tf2onnx.convert.from_function(tf.function(model), [spec], opset=18, output_path=str(path))
    return time.perf_counter() - start, path


def worker(method: str, network: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = (lambda: ours(network, Path(folder), method != "ours")) if method.startswith("ours") else \
            (lambda: theirs(network, Path(folder), method))
        seconds, path = run()
        import onnx
        nodes = len(onnx.load(path, load_external_data=False).graph.node) if path.stat().st_size < 3e8 else None
        size = path.stat().st_size
    return {"seconds": seconds, "file_mb": size / 1e6, "nodes": nodes}


def sample(method: str, network: str) -> dict[str, Any]:
    """One fresh process. Its peak is taken by the operating system over the conversion, before the result is read."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.export", "--worker", method, network],
                          capture_output=True, text=True, check=False)
    if done.returncode:  # the kernel ends a process that wants more memory than there is, by signal 9
        print(f"{network:15s} {method:12s} ended with {done.returncode}", flush=True)
        return {"network": network, "method": method, "failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{network:15s} {method:12s} {found['seconds']:7.2f} s   peak {found['peak_mb']:8.0f} MB   "
          f"file {found['file_mb']:6.1f} MB   nodes {found['nodes']}", flush=True)
    return {"network": network, "method": method, **found}


def ratio(network: str, method: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Ours to tf2onnx; null where tf2onnx did not end."""
    found: dict[str, Any] = {"network": network, "method": method, "seconds": None, "peak_mb": None}
    whole = [rows for rows in rounds if "failed" not in rows["tf2onnx"]]
    if whole:
        for key in ("seconds", "peak_mb"):
            found[key] = round(statistics.median(rows[method][key] / rows["tf2onnx"][key] for rows in whole), 3)
        print(f"{network:15s} {method} / tf2onnx: time {found['seconds']:.3f}, peak memory {found['peak_mb']:.3f}")
    return found


def help_seconds() -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pipeline.export", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "NETWORK"))
    parser.add_argument("--networks", default="resnet_v2_50,resnet_v2_152,vgg_16")
    parser.add_argument("--depths", default="50,101,152,200")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export.json"))
    arguments = parser.parse_args()
    if arguments.worker:
        found = worker(*arguments.worker)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB
        print(json.dumps({**found, "peak_mb": peak}))
        return
    result: dict[str, Any] = described("export") | {"samples": [], "ratios": [], "linear": [],
                                                    "help_seconds": help_seconds()}
    print(f"--help: {result['help_seconds']:.2f} s (median of 7)")
    for network in filter(None, arguments.networks.split(",")):
        rounds = [{method: sample(method, network) for method in METHODS} for _ in range(arguments.rounds)]
        result["samples"] += [row for rows in rounds for row in rows.values()]
        result["ratios"] += [ratio(network, method, rounds) for method in METHODS[:2]]
        save(arguments.out, result)
    for depth in filter(None, arguments.depths.split(",")):
        row = sample("ours", f"resnet_v2_{depth}")
        print(f"resnet_v2_{depth}: {row['seconds'] / UNITS[depth] * 1000:.0f} ms for each of {UNITS[depth]} units")
        result["linear"].append({**row, "units": UNITS[depth]})
        save(arguments.out, result)


if __name__ == "__main__":
    main()
