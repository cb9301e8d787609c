"""The file of a benchmark run: every sample, and all that a reader needs in order to judge them. Schema 1.

`benchmarks/<run-id>.json` holds one Run. Times are integers in nanoseconds of `perf_counter_ns`, from the call until
the output is on the host. Nothing in it is a summary: those are computed from the samples by whoever reads them.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from export.errors import UsageError
from pipeline import workspace

SCHEMA = 1
MODES = ("forward", "forward-backward")
Rounds = tuple[tuple[int, ...], ...]  # [round][sample], nanoseconds
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What was asked for. `burn_in`: None is auto. `steps`: samples of a configuration in all rounds together."""

    steps: int
    rounds: int
    burn_in: int | None
    min_seconds: float
    images: str
    seed: int


@dataclass(frozen=True)
class Environment:
    """The machine as it was. Unknown numbers are None; `gpu` is empty where there is none."""

    date: str
    host: str
    system: str
    python: str
    cpu: str
    cores: int
    affinity: tuple[int, ...]
    memory_bytes: int
    governor: str | None
    frequency_mhz: float | None
    load_before: float
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    gpu: Mapping[str, Any]


@dataclass(frozen=True)
class Limit:
    """What this machine can do at most in a precision: the best rate of a matrix product that a runtime reached."""

    precision: str
    flops_per_second: float
    runtime: str


@dataclass(frozen=True)
class Series:
    """One configuration and its samples. `status`: `measured`, or `failed` with the `reason`.

    `rewarm_ns`: the first steps of each round, when the caches hold another's data; they are not among the samples.
    `batch` images go through in each of `concurrency` processes at a time. `wall_ns`: of each round, until every
    process was done. `device_ns`: `host_to_device`, `compute` and `device_to_host` by CUDA events, on a GPU only.
    `flops` and `min_bytes` are of one step: operations, and the bytes of weights, inputs and outputs that must move at
    least. `load`: the share of all cores that other processes used in each round. `gpu`: its state after each round.
    `relative_l2` and `top1`: against the reference of the export.
    """

    runtime: str
    precision: str
    batch: int
    threads: int
    concurrency: int
    mode: str
    status: str
    reason: str = ""
    engine: str = ""
    burn_in_ns: tuple[int, ...] = ()
    settled: bool = False
    rounds_ns: Rounds = ()
    wall_ns: tuple[int, ...] = ()
    device_ns: Mapping[str, Rounds] = field(default_factory=dict)
    load: tuple[float, ...] = ()
    gpu: tuple[Mapping[str, Any], ...] = ()
    flops: int = 0
    min_bytes: int = 0
    peak_bytes: int = 0
    size_bytes: int = 0
    build_seconds: float = 0.0
    relative_l2: float | None = None
    top1: float | None = None
    rewarm_ns: Rounds = ()

    @property
    def name(self) -> str:
        """For people: `onnxruntime fp32`, with whatever else sets it apart from the others of a plain run."""
        more = [f"batch {self.batch}"]
        more += [f"{self.threads} threads"] if self.threads else []
        more += [f"x {self.concurrency}"] if self.concurrency > 1 else []
        more += [self.mode] if self.mode != "forward" else []
        return f"{self.runtime} {self.precision}, {', '.join(more)}"

    @property
    def key(self) -> tuple[str, str, int, int, int, str]:
        """What makes two series of two runs the same configuration."""
        return self.runtime, self.precision, self.batch, self.threads, self.concurrency, self.mode


@dataclass(frozen=True)
class Run:
    """One benchmark, in one go, on one machine. `receipts`: by file name of the engine."""

    run_id: str
    model: str
    model_sha256: str
    device: str
    command: str
    settings: Settings
    environment: Environment
    limits: tuple[Limit, ...]
    bandwidth_bytes_per_second: float
    series: tuple[Series, ...]
    receipts: Mapping[str, Any]
    complete: bool
    schema: int = SCHEMA


def write(run: Run, path: Path) -> None:
    """Raises WorkspaceError."""
    workspace.put_text(path, json.dumps(_plain(asdict(run))) + "\n")


def read(path: Path) -> Run:
    """Raises UsageError that names the field which is not what schema 1 says."""
    subject = f"benchmark run {path}"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(subject, error.strerror or "not readable", "a file that benchmark wrote") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(subject, "not JSON", "a file that benchmark wrote") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UsageError(subject, f"schema {found.get('schema') if isinstance(found, dict) else None}", f"{SCHEMA}",
                         "measure again with this version")
    try:
        run = typed(Run, found, "run")
    except ValueError as error:
        raise UsageError(subject, str(error), f"schema {SCHEMA}", "measure again") from error
    wrong = next((one for one in run.series if not _sound(one)), None)
    if wrong is not None:
        raise UsageError(subject, f"series {wrong.name} holds what no measurement gives", f"schema {SCHEMA}",
                         "measure again")
    return run


def _sound(one: Series) -> bool:
    samples = [n for r in (*one.rounds_ns, one.burn_in_ns, one.wall_ns) for n in r]
    return one.mode in MODES and one.status in ("measured", "failed") and min(one.batch, one.concurrency) >= 1 \
        and all(n > 0 for n in samples) and (one.status == "failed" or any(one.rounds_ns))


def typed(kind: Any, value: Any, where: str) -> Any:
    """`value`, of JSON, as the type `kind`: a dataclass, tuple, Mapping, union or plain type. Raises ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _dataclass(cast(type[Any], kind), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        return tuple(typed(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is types.UnionType:
        return None if value is None and type(None) in arguments else typed(arguments[0], value, where)
    if origin is not None:  # Mapping
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no object")
        return {name: typed(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where} is {type(value).__name__} {str(value)[:20]}, not {kind.__name__}")
    return value


def _dataclass(kind: type[T], value: Any, where: str) -> T:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    known = {f.name: f for f in fields(cast(Any, kind))}
    hints = typing.get_type_hints(kind)
    strange = sorted(set(value) - set(known))
    lacking = sorted(n for n, f in known.items()
                     if n not in value and f.default is MISSING and f.default_factory is MISSING)
    if strange or lacking:
        raise ValueError(f"{where} has no {lacking[0]}" if lacking else f"{where} has an unknown {strange[0]}")
    return kind(**{name: typed(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _plain(item: Any) -> Any:
    if isinstance(item, Mapping):
        return {name: _plain(value) for name, value in item.items()}
    return [_plain(value) for value in item] if isinstance(item, (tuple, list)) else item
