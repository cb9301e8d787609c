"""Runs made by hand, such as a machine could have measured: the samples come from a seed, nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.load_record import Level, Load
from pipeline.record import Environment, Limit, Rounds, Run, Series, Settings

# runtime, precision, milliseconds at batch 1, relative L2 error, megabytes
ENGINES = (("tensorflow", "fp32", 24.0, 2.1e-7, 102.9), ("tensorflow-xla", "fp32", 19.6, 3.0e-7, 102.9),
           ("onnxruntime", "fp32", 16.2, 1.1e-6, 102.3), ("onnxruntime", "int8", 7.1, 2.0e-2, 25.9),
           ("openvino", "fp32", 14.8, 9.0e-7, 102.4), ("openvino", "bf16", 11.9, 4.1e-3, 51.3),
           ("openvino", "int8", 7.9, 3.4e-2, 26.2))


def rounds(milliseconds: float, seed: int, count: int = 5, steps: int = 20, spread: float = 0.01) -> Rounds:
    """A lognormal bulk, and a slow step now and then."""
    rng = np.random.default_rng(seed)
    factors = np.exp(rng.normal(0, spread, (count, steps))) + (rng.random((count, steps)) < 0.03) * 0.2
    return tuple(tuple(int(n) for n in row) for row in milliseconds * 1e6 * factors)


def series(runtime: str = "onnxruntime", precision: str = "fp32", milliseconds: float = 16.0, seed: int = 0,
           **changes: Any) -> Series:
    """Measured, steady and settled, unless `changes` say otherwise."""
    measured: Rounds = changes.pop("rounds_ns", None) or rounds(milliseconds, seed)
    count = changes.get("concurrency", 1)
    burn_in = tuple(int(milliseconds * 1e6 * (1 + (2 + seed % 5) * (0.5 + seed % 7 / 20) ** i)) for i in range(12))
    one = Series(
        runtime, precision, batch=1, threads=0, concurrency=1, mode="forward", status="measured",
        engine=f"{runtime}-{precision}-0123456789ab.onnx", burn_in_ns=burn_in, settled=True, rounds_ns=measured,
        wall_ns=tuple(sum(one) // count for one in measured), load=(0.01,) * len(measured), flops=8_200_000_000,
        min_bytes=103_000_000, peak_bytes=412_000_000, size_bytes=102_300_000, build_seconds=3.2, relative_l2=1e-6,
        top1=1.0)
    return replace(one, **changes)


def environment(**changes: Any) -> Environment:
    found = Environment(
        date="2026-03-02T10:00:00+00:00", host="bench-1", system="Linux-6.1", python="3.11.9",
        cpu="Example Xeon 8488C", cores=16, affinity=tuple(range(32)), memory_bytes=128 * 10**9, governor="performance",
        frequency_mhz=3200.0, load_before=0.01,
        versions={"enginesmith": "0.1.0", "onnxruntime": "1.23.0", "tensorflow": "2.20.0"},
        variables={"OMP_NUM_THREADS": "16"}, gpu={})
    return replace(found, **changes)


def sha(runtime: str, precision: str) -> str:
    """Of the engine, in its receipt."""
    return f"{runtime}-{precision}".encode().hex().ljust(64, "0")


def run(found: Sequence[Series] = (), **changes: Any) -> Run:
    made = Run(
        run_id="20260302-100000", model="resnet_v2_50", model_sha256="ab" * 32, device="cpu",
        command="python -m pipeline.benchmark resnet_v2_50 --steps 100",
        settings=Settings(100, 5, None, 0.0, "random", 0), environment=environment(),
        limits=(Limit("fp32", 2e12, "onnxruntime"), Limit("int8", 6e12, "openvino"), Limit("bf16", 4e12, "openvino")),
        bandwidth_bytes_per_second=1e11, series=tuple(found) or every_engine(), complete=True,
        receipts={f"{runtime}-{precision}-0123456789ab.onnx": {"sha256": sha(runtime, precision)}
                  for runtime, precision, *_ in ENGINES})
    return replace(made, **changes)


def every_engine(batches: Sequence[int] = (1,), concurrency: Sequence[int] = (1,)) -> tuple[Series, ...]:
    """All of ENGINES at each batch size and concurrency."""
    return tuple(
        series(runtime, precision, ms * batch ** 0.8 * count ** 0.6, seed=100 * i + 10 * batch + count, batch=batch,
               concurrency=count, relative_l2=error, size_bytes=int(mb * 1e6))
        for batch in batches for count in concurrency for i, (runtime, precision, ms, error, mb) in enumerate(ENGINES))


def on_gpu() -> Run:
    """Time by CUDA events too, throttled once."""
    found = []
    for i, (runtime, precision, ms) in enumerate((("tensorflow", "fp32", 4.1), ("onnxruntime", "fp16", 1.3),
                                                  ("tensorrt", "fp32", 1.6), ("tensorrt", "fp16", 0.82),
                                                  ("tensorrt", "int8", 0.61))):
        device = {"host_to_device": rounds(0.09, i), "compute": rounds(ms * 0.7, i + 10),
                  "device_to_host": rounds(0.01, i + 20)}
        state = {"sm_mhz": 1980, "throttle_reasons": ["software power cap"] if precision == "int8" else []}
        found.append(series(runtime, precision, ms, i, device_ns={} if runtime == "tensorflow" else device,
                            gpu=(state,) * 5, relative_l2={"fp32": 2e-6, "fp16": 1.1e-3, "int8": 2.4e-2}[precision]))
    return run(found, run_id="20260303-110000", device="cuda:0", limits=(), bandwidth_bytes_per_second=0.0,
               environment=environment(host="bench-2", date="2026-03-03T11:00:00+00:00",
                                       gpu={"name": "NVIDIA H100 80GB HBM3", "driver": "580.65"}))


def load(**changes: Any) -> Load:
    """Clients of a server of run()'s model: the mean is 21 ms alone, 5 of them in the queue and 12 computing."""
    levels = []
    for transport, way in (("grpc", 2.5), ("http", 3.5)):
        for clients in (1, 8):
            rungs = [int(ms * clients * 1e6) for ms in (5.0, 0.6, 12.0, 0.4)]
            mean = sum(rungs) + int(way * 1e6)
            levels.append(Level(transport, clients, 1, 3.0, (mean - 2_000_000, mean, mean + 2_000_000), {},
                                1.0 if clients == 1 else 4.0, *map(float, rungs)))
    made = Load("20260302T110000-ab12", "resnet_v2_50", "ab" * 32, sha("onnxruntime", "fp32"), "fp32", "http://127.0.0.1:8000",
                "python -m pipeline.deploy resnet_v2_50 --check http://127.0.0.1:8000 --load", environment(),
                tuple(levels))
    return replace(made, **changes)
