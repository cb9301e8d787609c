"""What serving costs: the same engine in process and behind the real tritonserver, side by side on the same cores.

    python -m benchmarks.serving [--network resnet_v2_50] [--clients 1,8,16] [--rounds 5] [--seconds 4]

The engine is deployed as `deploy` does it, and served by `serve`. In each round the engine runs in process for a lone
image and for its best batch, then the server answers the clients over each transport; all processes stay alive, those
not measured are idle. A ratio is the median over the rounds of two rates, or latencies, of the same round. Clients run
in this process, on the same cores as the server: what they cost is in the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import described, save
from engines import receipt
from engines.worker import Worker
from pipeline import deploy, serve, served, verify
from pipeline.capacity import Curve, Point
from pipeline.load_record import RUNGS
from pipeline.record import typed
from pipeline.workspace import ENGINES

PAUSE = 0.3  # thread pools of the one before spin on for a while


def peak_mb(pid: int) -> float:
    """The largest resident sizes of a process and all below it; shared memory is counted in each."""
    found = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(True)):
        lines = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
        found += next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return found / 1e3


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    made = deploy.deploy(deploy.Request(asked.network, folder, precision=asked.precision), print)
    assert made.engine is not None and made.choice is not None
    home = folder / asked.network
    curve: Curve = typed(Curve, json.loads(next((home / deploy.CAPACITY).glob("*.json")).read_bytes()), "curve")
    alone: list[Point] = [p for p in curve.points if p.instances == 1]
    best = max(alone, key=lambda p: p.images_per_second).batch
    inputs, _ = verify.load_reference(home / "reference.npz")
    model = home / ("model.onnx" if asked.precision == "fp32" else f"model.{asked.precision}.onnx")
    clients = [int(n) for n in asked.clients.split(",")]
    rounds = []
    with Worker(receipt.request_of(made.engine, model)) as worker, \
            serve.started(serve.Request(made.repository)) as server:
        worker.load(home / ENGINES / made.engine.file)
        feeds = {batch: verify.cycled(inputs, batch) for batch in {1, best}}
        for _ in range(asked.rounds):
            row: dict[str, Any] = {"served": []}
            for name, batch in (("lone_ms", 1), ("best_ms", best)):
                worker.prepare(feeds[batch])
                time.sleep(PAUSE)
                worker.time(1)
                step = statistics.median(worker.time(3).wall) / 1e9
                samples = worker.time(max(5, round(asked.seconds / step))).wall
                row[name] = statistics.median(samples) / 1e6
            row["best_images_per_second"] = best / statistics.fmean(samples) * 1e9
            for transport in asked.transports.split(","):
                for count in clients:
                    time.sleep(PAUSE)
                    one = served.level(server.endpoint, asked.network, feeds[1], transport, count, asked.seconds)
                    row["served"].append({
                        "transport": transport, "clients": count, "images_per_second": one.images_per_second,
                        "p50_ms": one.percentile_ms(50), "p99_ms": one.percentile_ms(99), "mean_batch": one.mean_batch,
                        "queue_ms": one.queue_ns / 1e6, "infer_ms": one.compute_infer_ns / 1e6,
                        "the_way_ms": one.rungs_ms[RUNGS[-1]], "errors": sum(one.errors.values())})
            rounds.append(row)
        memory = {"in_process": worker.peak_bytes() / 1e6, "server": peak_mb(server.pid)}
    return {"network": asked.network, "precision": asked.precision, "best_batch": best, "why": made.choice.why,
            "peak_mb": memory, "rows": summary(rounds), "rounds": rounds}


def summary(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds; `limit_ms`: 15 % and 2 ms above the lone image in process."""
    rows = []
    for i, first in enumerate(rounds[0]["served"]):
        found = [r["served"][i] for r in rounds]
        rows.append({
            "transport": first["transport"], "clients": first["clients"],
            "images_per_second": statistics.median(f["images_per_second"] for f in found),
            "share_of_in_process": round(statistics.median(
                f["images_per_second"] / r["best_images_per_second"] for f, r in zip(found, rounds, strict=True)), 3),
            "p50_ms": statistics.median(f["p50_ms"] for f in found),
            "p99_ms": statistics.median(f["p99_ms"] for f in found),
            "lone_in_process_ms": statistics.median(r["lone_ms"] for r in rounds),
            "p50_above_15_percent_ms": round(statistics.median(
                f["p50_ms"] - 1.15 * r["lone_ms"] for f, r in zip(found, rounds, strict=True)), 2),
            "mean_batch": statistics.median(f["mean_batch"] for f in found),
            "queue_ms": statistics.median(f["queue_ms"] for f in found),
            "infer_ms": statistics.median(f["infer_ms"] for f in found),
            "the_way_ms": statistics.median(f["the_way_ms"] for f in found),
            "errors": sum(f["errors"] for f in found)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--network", default="resnet_v2_50")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--clients", default="1,8,16")
    parser.add_argument("--transports", default="grpc,http,shared-memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--artifacts", type=Path, help="a folder of exports, to be used again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = described("serving") | measure(asked, asked.artifacts or Path(folder))
    save(asked.out, result)
    rates = [r["best_images_per_second"] for r in result["rounds"]]
    print(f"in process: a lone image {result['rows'][0]['lone_in_process_ms']:.1f} ms; batch {result['best_batch']}: "
          f"{statistics.median(rates):.1f} images/s; peak MB {result['peak_mb']}")
    for row in result["rows"]:
        print(f"{row['transport']:14s} {row['clients']:3d} clients {row['images_per_second']:6.1f} images/s, "
              f"{row['share_of_in_process']:.2f} of in process; p50 {row['p50_ms']:6.1f} ms, "
              f"{row['p50_above_15_percent_ms']:6.1f} ms above 1.15 x a lone image; batch {row['mean_batch']:.1f}, "
              f"queue {row['queue_ms']:.1f}, infer {row['infer_ms']:.1f}, the way {row['the_way_ms']:.1f} ms, "
              f"errors {row['errors']}", flush=True)


if __name__ == "__main__":
    main()
