"""The file of a load test, `loads/<id>.json`: what clients of a server saw, beside the server's own statistics.

served.py measures and writes it, the report reads it: this module needs no server and no client.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.errors import UsageError
from pipeline import record
from pipeline.record import Environment

LOADS = "loads"  # of an artifact folder
SCHEMA = 1
# of a request, in the order in which it passes them; the last is what the server's own statistics do not explain
RUNGS = ("queue", "compute input", "compute", "compute output", "the way there and back")


@dataclass(frozen=True)
class Level:
    """`clients` that each send the next request when the last is answered, for `seconds`.

    `latency_ns` of every answered request; `errors`: text -> how many. `mean_batch`: images in an execution. The rungs
    are the server's means for one request, in nanoseconds.
    """

    transport: str
    clients: int
    batch: int
    seconds: float
    latency_ns: tuple[int, ...]
    errors: Mapping[str, int]
    mean_batch: float
    queue_ns: float
    compute_input_ns: float
    compute_infer_ns: float
    compute_output_ns: float

    @property
    def images_per_second(self) -> float:
        return len(self.latency_ns) * self.batch / self.seconds if self.seconds else 0.0

    def percentile_ms(self, share: float) -> float:
        """Of the answered requests; not a number if there were none."""
        return float(np.percentile(self.latency_ns, share)) / 1e6 if self.latency_ns else float("nan")

    @property
    def rungs_ms(self) -> Mapping[str, float]:
        """The mean latency of a request, taken apart by RUNGS; they add up to it."""
        server = [ns / 1e6 for ns in (self.queue_ns, self.compute_input_ns, self.compute_infer_ns,
                                      self.compute_output_ns)]
        mean = float(np.mean(self.latency_ns)) / 1e6 if self.latency_ns else float("nan")
        return dict(zip(RUNGS, (*server, max(0.0, mean - sum(server))), strict=True))


@dataclass(frozen=True)
class Load:
    """One load test. `engine_sha256`: of the engine that the server says it runs."""

    load_id: str
    model: str
    model_sha256: str
    engine_sha256: str
    precision: str
    url: str
    command: str
    environment: Environment
    levels: tuple[Level, ...]
    schema: int = SCHEMA


def read(path: Path) -> Load:
    """Raises UsageError that names the field which is not what schema 1 says."""
    try:
        found: Load = record.typed(Load, json.loads(path.read_bytes()), "load")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"load test {path}", str(error), f"schema {SCHEMA}", "measure again") from error
    return found
