"""Is the instrument right? The measuring loop and the verdicts of the benchmark against what is known.

    python -m benchmarks.instrument [--network resnet_v2_50] [--simulations 100]

1. A runtime that spins for a known time: the bias of the median, and what a step costs beside the call.
2. The same ONNX model by the benchmark's worker and by a bare onnxruntime loop in a process of its own, taking turns.
3. Simulated runs with the settings of the command line and the noise of a quiet machine: how often two identical
   configurations are told apart, and how often a true difference of 5 % is found.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from benchmarks.common import described, save
from engines.runtime import BuildRequest
from engines.worker import Worker, timed
from pipeline import statistics as estimators
from pipeline.export import ExportRequest, export

SPINS_MS = (0.1, 1.0, 5.0, 20.0)
BARE = """
import sys, time, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
feeds = {"images": numpy.load(sys.argv[2])}
for line in sys.stdin:
    for _ in range(int(line)):
        start = time.perf_counter_ns()
        session.run(None, feeds)
        print(time.perf_counter_ns() - start)
    print("end", flush=True)
"""


class Spin:
    """A prepared run that takes `ms` milliseconds."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def __init__(self, ms: float) -> None:
        self.inputs, self.outputs, self._ns = {}, {}, round(ms * 1e6)

    def __call__(self) -> None:
        end = perf_counter_ns() + self._ns
        while perf_counter_ns() < end:
            pass


class Nothing(Spin):
    def __call__(self) -> None:
        pass


def known_times() -> dict[str, Any]:
    rows = []
    for ms in SPINS_MS:
        median = statistics.median(timed(Spin(ms), max(20, round(500 / ms))).wall) / 1e6
        rows.append({"known_ms": ms, "median_ms": median, "bias": median / ms - 1})
        print(f"spin of {ms:5.1f} ms: median {median:.5f} ms, bias {median / ms - 1:+.4%}", flush=True)
    steps = 100_000
    start = perf_counter_ns()
    timed(Nothing(0), steps)
    overhead = (perf_counter_ns() - start) / steps / 1000
    print(f"a step costs {overhead:.2f} us beside its call", flush=True)
    return {"spins": rows, "overhead_us_per_step": overhead}


def against_a_bare_loop(network: str, rounds: int, steps: int) -> dict[str, Any]:
    """Medians of each round, in nanoseconds. Both load the same file with ONNX Runtime's defaults."""
    folder = export(ExportRequest(network)).folder
    images = np.random.default_rng(0).standard_normal((1, 224, 224, 3), np.float32)
    path = folder / "instrument.npy"
    np.save(path, images)
    ours, theirs = list[float](), list[float]()
    with Worker(BuildRequest(folder / "model.onnx", "onnxruntime")) as worker, subprocess.Popen(
            [sys.executable, "-c", BARE, str(folder / "model.onnx"), str(path)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True) as bare:
        worker.build()
        worker.prepare({"images": images})

        def turn(count: int) -> list[int]:
            assert bare.stdin and bare.stdout
            print(count, file=bare.stdin, flush=True)
            return [int(line) for line in iter(bare.stdout.readline, "end\n")]

        worker.time(10)
        turn(10)
        for _ in range(rounds):
            ours.append(statistics.median(worker.time(steps).wall))
            theirs.append(statistics.median(turn(steps)))
        assert bare.stdin
        bare.stdin.close()
    path.unlink()
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    medians = [statistics.median(found) / 1e6 for found in (ours, theirs)]
    print(f"{network}: ours {medians[0]:.3f} ms, a bare loop {medians[1]:.3f} ms, ratio {ratio:.4f} (median of "
          f"{rounds} rounds)", flush=True)
    return {"network": network, "ours_ns": ours, "bare_ns": theirs, "ratio": ratio}


def simulated(rng: np.random.Generator, factor: float, spread: float, rounds: int = 5, steps: int = 20
              ) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two configurations of 10 ms and 10/factor ms. Each round has a drift that both share (2 %) and one of its own
    (0.5 %); samples vary by `spread`, and 2 in 100 are up to twice as long."""
    pair: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for _ in range(rounds):
        drift = rng.normal(1, 0.02)
        for found, base in zip(pair, (1e7, 1e7 / factor), strict=True):
            noise = np.exp(rng.normal(0, spread, steps)) * (1 + (rng.random(steps) < 0.02) * rng.random(steps))
            found.append(base * drift * rng.normal(1, 0.005) * noise)
    return pair


def verdicts(simulations: int, spread: float) -> dict[str, Any]:
    found = {}
    for factor in (1.0, 1.02, 1.05):
        told = [estimators.compare(*simulated(np.random.default_rng(seed), factor, spread)).verdict
                for seed in range(simulations)]
        found[str(factor)] = {verdict: told.count(verdict) for verdict in ("faster", "slower", "not told apart")}
        print(f"a true ratio of {factor}: " + ", ".join(f"{v} {n}" for v, n in found[str(factor)].items()), flush=True)
    return {"simulations": simulations, "spread": spread, "verdicts": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--network", default="resnet_v2_50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--spread", type=float, default=0.015, help="of simulated samples; 0.015: a quiet machine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/instrument.json"))
    asked = parser.parse_args()
    save(asked.out, described("instrument") | {
        "known_times": known_times(), "bare_loop": against_a_bare_loop(asked.network, asked.rounds, asked.steps),
        "verdicts": verdicts(asked.simulations, asked.spread)})


if __name__ == "__main__":
    main()
