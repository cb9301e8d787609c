"""How many requests an engine should take together, and how many instances of it should run: measured, then chosen.

The curve is throughput and latency of every batch size, for one instance with all cores, for one instance a core, and
for as many instances as each has cores. With dynamic batching a request waits, at worst, for the batch that runs and
the one that Triton has put together behind it: its latency is at most the queue delay and three times that of a batch,
and more by a batch for each that fills the queue. So a limit holds up to a number of requests in flight, which the
choice says and what is in front of the server has to keep (KServe's containerConcurrency does): Triton's own queue
policies are not fit for it, see Batching.
"""

from __future__ import annotations

import contextlib
import json
import platform
from dataclasses import asdict, dataclass, replace
from math import isqrt
from pathlib import Path
from time import perf_counter

import numpy as np

from engines.receipt import Receipt
from engines.runtime import BuildRequest
from engines.worker import Worker
from export.errors import UsageError
from pipeline import environment, record, verify, workspace
from pipeline.export import Progress
from pipeline.triton_config import Batching

BATCHES = (1, 2, 4, 8, 16, 32, 64)
STEPS, SECONDS = 5, 1.0  # of each point, at least the one and about the other
ENOUGH = 0.95  # the smallest batch with this share of the best throughput is preferred
# of a lone image's time: what a server on the same cores spends beside each execution; by benchmarks/serving.py, 40 ms
# in the place of 33 for batches of one
SERVED = 0.15
WORTH = 1.2  # more instances have to bring this much, since a lone request then has fewer cores
WAIT = 0.05  # a lone request waits for others at most this share of its time
SERVER_BYTES = 512 << 20  # of tritonserver beside its models: 70 MB of its own, room for requests on their way
AHEAD = 2  # batches that a request finds at worst: one runs, one is put together
WAY = 0.2  # of a latency limit, left for the server and the way to it; its clients may run on the same cores
MEMORY = 0.5  # of the machine's, for all instances together


@dataclass(frozen=True)
class Point:
    """`instances` processes with `threads` each run batches of `batch` at the same time; times in nanoseconds.
    `peak_bytes`: of the machine's memory; `gpu_bytes`: of the GPU's."""

    batch: int
    instances: int
    threads: int
    median_ns: float
    p95_ns: float
    images_per_second: float
    peak_bytes: int
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Curve:
    """The points of one engine on one machine."""

    engine_sha256: str
    host: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Choice:
    """`why`: a line for each decision. `memory_bytes`: of all instances. `in_flight`: requests, of one image or of the
    fixed batch, that are answered within the latency limit; without one, the batches that run and those that gather.
    """

    batching: Batching
    images_per_second: float
    memory_bytes: int
    in_flight: int
    why: tuple[str, ...]


def measured(wish: BuildRequest, path: Path, made: Receipt, reference: verify.Case, kept: Path, progress: Progress
             ) -> Curve:
    """The curve of an engine that runs here, or the one that `kept` has of it."""
    with contextlib.suppress(OSError, ValueError):
        curve: Curve = record.typed(Curve, json.loads(kept.read_bytes()), "curve")
        if (curve.engine_sha256, curve.host) == (made.sha256, platform.node()):
            return curve
    smallest, largest = min(p.min for p in wish.profiles), max(p.max for p in wish.profiles)
    batches = sorted({b for b in BATCHES if smallest <= b <= largest} | {largest})
    cores = environment.usable_cores()
    counts = {1: made.key["options"]["threads"] or cores} if wish.device == "cpu" else {1: 0, 2: 0}
    if wish.device == "cpu":
        counts |= {n: cores // n for n in (isqrt(cores), cores) if n > 1}
    points = []
    for instances, threads in counts.items():
        progress(f"throughput of {instances} instance{'s' if instances > 1 else ''}")
        points += _points(wish, path, reference, instances, threads, batches)
    curve = Curve(made.sha256, platform.node(), tuple(points))
    workspace.put_text(kept, json.dumps(asdict(curve), indent=1) + "\n")
    return curve


def _points(wish: BuildRequest, path: Path, reference: verify.Case, instances: int, threads: int,
            batches: list[int]) -> list[Point]:
    wish = replace(wish, options=replace(wish.options, threads=threads))
    found = []
    before = _gpu_bytes(wish.device)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(wish)) for _ in range(instances)]
        for worker in workers:
            worker.load(path)
        for batch in batches:
            for worker in workers:
                worker.prepare(verify.cycled(reference[0], batch))
            once = max(worker.time(2).wall[-1] for worker in workers) / 1e9
            steps = max(STEPS, round(SECONDS / once))
            start = perf_counter()
            for worker in workers:
                worker.start_timing(steps)
            samples = [n for worker in workers for n in worker.finish_timing().wall]
            passed = perf_counter() - start
            found.append(Point(batch, instances, threads, float(np.median(samples)),
                               float(np.percentile(samples, 95)), instances * steps * batch / passed,
                               sum(worker.peak_bytes() for worker in workers),
                               max(0, _gpu_bytes(wish.device) - before)))
    return found


def _gpu_bytes(device: str) -> int:
    return 0 if device == "cpu" else environment.gpu_memory(device, used=True)


def choose(curve: Curve, max_latency_ms: float | None, memory_bytes: int, batched: bool = True) -> Choice:
    """`batched`: whether Triton may put requests together, which it cannot for a model with a fixed batch. Raises
    UsageError where no batch size holds the limit."""
    limit_ns = float("inf") if max_latency_ms is None else (1 - WAY) * max_latency_ms * 1e6
    fitting = [p for p in curve.points if (p.gpu_bytes or p.peak_bytes) <= MEMORY * memory_bytes or p.instances == 1]
    held = [p for p in fitting if _worst(p, batched) <= limit_ns]
    if not held:
        fastest = min(fitting, key=lambda p: _worst(p, batched))
        raise UsageError(f"max-latency-ms {max_latency_ms:g}", f"a lone request takes {fastest.p95_ns / 1e6:.1f} ms "
                         "(95th percentile)", "a longer limit", "or a faster engine, e.g. --precision int8")
    best = {n: max(p.images_per_second for p in held if p.instances == n) for n in sorted({p.instances for p in held})}
    fewest = min(best)
    instances = next((n for n in sorted(best, reverse=True) if best[n] >= WORTH * best[fewest]), fewest)
    line = sorted((p for p in held if p.instances == instances), key=lambda p: p.batch)
    rates = ", ".join(f"{n}: {rate:.0f} images/s" for n, rate in best.items())
    why = [f"instances {instances}, {line[0].threads} threads each ({rates}; more instances have to bring "
           f"{WORTH - 1:.0%}, a lone request has fewer cores then)"]
    rated = [p.images_per_second * p.median_ns / (p.median_ns + SERVED * line[0].median_ns) for p in line]
    chosen = next(p for p, rate in zip(line, rated, strict=True) if rate >= ENOUGH * max(rated))
    largest = line[-1]
    if batched:
        batching = _together(line, chosen, limit_ns, why)
        if max_latency_ms is None:
            why.append(f"largest batch {batching.max_batch}: the engine's; no latency limit was given")
        else:
            top = max(p.batch for p in curve.points)
            reason = "the engine's" if batching.max_batch == top else "the largest that holds it"
            worst = batching.delay_us * 1e3 + _worst(largest, batched)
            why.append(f"largest batch {batching.max_batch}: {reason}; behind {AHEAD if largest.batch > 1 else 0} "
                       f"batches it takes at most {worst / 1e6:.1f} ms of {max_latency_ms:g} ms")
    else:
        batching = Batching(0, instances=instances, threads=chosen.threads)
        why.append(f"the model has a fixed batch of {chosen.batch}, which takes {chosen.median_ns / 1e6:.1f} ms: "
                   "requests are not put together")
    if max_latency_ms is None:
        in_flight = 2 * instances * (chosen.batch if batched else 1)
    else:
        rounds = max(1, int((limit_ns - batching.delay_us * 1e3) / largest.p95_ns))
        in_flight = rounds * instances * (largest.batch if batched else 1)
        why.append(f"the limit holds up to {in_flight} requests in flight; more wait longer, so keep them off in front "
                   "of the server")
    return Choice(batching, chosen.images_per_second, max(p.peak_bytes for p in line), in_flight, tuple(why))


def _together(line: list[Point], chosen: Point, limit_ns: float, why: list[str]) -> Batching:
    """The dynamic batching of the points of one number of instances, from the smallest batch to the largest."""
    lone, largest = line[0], line[-1]
    saved = max(0.0, lone.median_ns - chosen.median_ns / chosen.batch)
    room = limit_ns - _worst(largest, True)
    delay_us = int(max(0.0, min(saved, WAIT * lone.median_ns, room)) / 1e3) if chosen.batch > 1 else 0
    why += [f"preferred batch {chosen.batch}: {chosen.images_per_second:.0f} images/s in {chosen.median_ns / 1e6:.1f} "
            f"ms, the smallest within {1 - ENOUGH:.0%} of the best if the server adds {SERVED:.0%} of a lone image's "
            f"{lone.median_ns / 1e6:.1f} ms to each batch",
            f"queue delay {delay_us} us: at most what batching saves an image, and {WAIT:.0%} of a lone one's time"]
    return Batching(largest.batch, (chosen.batch,), delay_us, chosen.instances, chosen.threads)


def _worst(point: Point, batched: bool) -> float:
    """What a request takes behind the batches ahead; where only a batch of one holds the limit, it is a lone one's."""
    return point.p95_ns * (1 + AHEAD if batched and point.batch > 1 else 1)


def unmeasured(profiles: int, preferred: tuple[int, ...], batched: bool) -> Choice:
    """For an engine that cannot run here: the batch sizes it was tuned for."""
    batching = Batching(profiles, preferred) if batched else Batching(0)
    return Choice(batching, 0.0, 0, 0, ("not measured, since the engine cannot run here: preferred batches are those "
                                        "it was tuned for, no queue delay, one instance",))


def machine_memory(device: str) -> int:
    """Bytes of the machine or of the GPU."""
    return environment.usable_memory() if device == "cpu" else environment.gpu_memory(device)


