"""A deployed model over the wire: are its numbers Keras's, and how does it bear load.

check() sends the reference inputs over HTTP and gRPC, alone and from several clients at once, and compares by verify's
limits. load() keeps a number of clients busy and splits the latency by the server's own statistics: queue, compute
input, infer and output; what is left is the way there and back.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from time import perf_counter, perf_counter_ns, sleep
from typing import Any
from urllib.parse import urlsplit
from zipfile import BadZipFile

import numpy as np

from engines.errors import EngineError, ServerError, ServerTimeout, VerifyFailed
from engines.runtime import missing
from export.errors import UsageError
from pipeline import environment, triton_config, verify, workspace
from pipeline.export import Progress
from pipeline.load_record import Level, Load
from pipeline.model_repository import DEPLOYMENT, PROOF
from pipeline.triton_config import CONFIG
from pipeline.verify import Case, Comparison

try:
    import tritonclient.grpc
    import tritonclient.http
    from tritonclient.utils import InferenceServerException
except ImportError as error:
    raise missing("tritonclient", "deploy") from error

TRANSPORTS = ("grpc", "http", "shared-memory")
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
TIMEOUT_SECONDS = 60.0
LOAD_SECONDS = 900.0  # ONNX Runtime's TensorRT provider builds its engine while a model is loaded
AT_ONCE = 4  # clients of a check
Infer = Callable[[], Any]  # one request; an object with as_numpy(name)


@dataclass(frozen=True)
class Endpoint:
    """A server's host and the ports of its HTTP, gRPC and metrics services."""

    host: str
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def ready(self) -> bool:
        """What the server says of itself. A backend process that died does not change it."""
        try:
            return self._ask("/v2/health/ready") is not None
        except ServerError:
            return False

    def load(self, model: str) -> str | None:
        """Has the server load what its repository holds of a model; the reason, if it refuses."""
        try:
            self._ask(f"/v2/repository/models/{model}/load", b"{}", LOAD_SECONDS)
        except ServerError as error:
            return str(error)
        return None

    def unload(self, model: str) -> None:
        """Has the server let go of a model, if it runs and has it."""
        with contextlib.suppress(ServerError):
            self._ask(f"/v2/repository/models/{model}/unload", b"{}")

    def has(self, model: str) -> bool:
        """Whether the model is served."""
        try:
            return self._ask(f"/v2/models/{model}/ready") is not None
        except ServerError:
            return False

    def successes(self, model: str) -> int:
        """How many requests the model has answered, of all its versions, and not from a response cache."""
        found = [one["inference_stats"] for one in self.statistics(model)]
        return sum(int(one["success"]["count"]) - int(one["cache_hit"]["count"]) for one in found)

    def statistics(self, model: str) -> list[dict[str, Any]]:
        """Of each version.
        https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md"""
        found: list[dict[str, Any]] = self._json(f"/v2/models/{model}/stats", dict).get("model_stats", [])
        return found

    def configuration(self, model: str) -> Any:
        """The ModelConfig that the server runs. Raises ServerError."""
        return triton_config.from_json(self._json(f"/v2/models/{model}/config", dict))

    def states(self, model: str) -> dict[int, tuple[str, str]]:
        """Version -> (state, reason) of each that the server has tried to load. Raises ServerError.
        https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md"""
        return {int(one["version"]): (one.get("state", ""), one.get("reason", ""))
                for one in self._json("/v2/repository/index", list, b"{}")
                if one["name"] == model and "version" in one}

    def _json(self, path: str, kind: type, data: bytes | None = None) -> Any:
        try:
            found = json.loads(self._ask(path, data))
        except ValueError:
            found = None
        if not isinstance(found, kind):
            raise ServerError(f"server {self.host}:{self.http}", f"{path} is no JSON {kind.__name__}",
                              "a Triton server")
        return found

    def _ask(self, path: str, data: bytes | None = None, timeout: float = TIMEOUT_SECONDS) -> bytes:
        request = urllib.request.Request(f"http://{self.host}:{self.http}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode("utf-8", "replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]
            raise ServerError(f"server {self.host}:{self.http}", f"{error.code}: {text}"[:500]) from error
        except (OSError, HTTPException) as error:
            raise ServerError(f"server {self.host}:{self.http}", str(getattr(error, "reason", error)), "a server "
                              "that answers HTTP", "python -m pipeline.serve DIR starts one here") from error


def endpoint(url: str, grpc_port: int | None = None) -> Endpoint:
    """`http://host:port`; gRPC and metrics are on the next two ports. Raises UsageError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or 8000
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise UsageError(f"URL {url!r}", "not an address of a server", "http://HOST:PORT of its HTTP service")
    return Endpoint(parts.hostname, port, grpc_port or port + 1, port + 2)


def reachable(at: Endpoint) -> tuple[str, ...]:
    """Another machine's server maps no shared memory of this one."""
    return TRANSPORTS if is_loopback(at.host) else TRANSPORTS[:2]


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it."""
    return address == "localhost" or address == "::1" or address.startswith("127.")


# --- one client ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def client(at: Endpoint, transport: str, model: str, feeds: Mapping[str, np.ndarray],
           timeout: float = TIMEOUT_SECONDS) -> Iterator[Infer]:
    """A function that sends `feeds` (batch first) and returns the answer. The function raises ServerError."""
    module = tritonclient.http if transport == "http" else tritonclient.grpc
    inputs = []
    for name, array in feeds.items():
        inputs.append(module.InferInput(name, array.shape, _wire_type(array)))
    with contextlib.ExitStack() as stack:
        if module is tritonclient.http:
            one = tritonclient.http.InferenceServerClient(f"{at.host}:{at.http}", connection_timeout=timeout,
                                                          network_timeout=timeout)
            more: dict[str, Any] = {}
        else:
            one = tritonclient.grpc.InferenceServerClient(f"{at.host}:{at.grpc}")
            more = {"client_timeout": timeout}
        stack.callback(one.close)
        if transport == "shared-memory":
            _share(stack, one, inputs, feeds)
        else:
            for value, array in zip(inputs, feeds.values(), strict=True):
                value.set_data_from_numpy(array)

        def infer() -> Any:
            try:
                return one.infer(model, inputs, **more)
            except InferenceServerException as error:
                kind = ServerTimeout if error.status() == "StatusCode.DEADLINE_EXCEEDED" else ServerError
                raise kind(f"model {model}", f"{error.status()}: {error.message()}"[:500]) from error
            except (OSError, EOFError, HTTPException) as error:  # of gevent's HTTP client
                raise ServerError(f"model {model}", str(error) or type(error).__name__) from error
        yield infer


def _share(stack: contextlib.ExitStack, one: Any, inputs: Sequence[Any], feeds: Mapping[str, np.ndarray]) -> None:
    """The inputs in system shared memory, which the server maps: only their names go over the wire."""
    from tritonclient.utils import shared_memory

    for value, (name, array) in zip(inputs, feeds.items(), strict=True):
        key = f"enginesmith_{secrets.token_hex(8)}_{name}"
        handle = shared_memory.create_shared_memory_region(key, f"/{key}", array.nbytes)
        stack.callback(shared_memory.destroy_shared_memory_region, handle)
        shared_memory.set_shared_memory_region(handle, [array])
        one.register_system_shared_memory(key, f"/{key}", array.nbytes)
        stack.callback(_unregister, one, key)
        value.set_shared_memory(key, array.nbytes)


def _unregister(one: Any, key: str) -> None:
    """The server may answer a moment before it lets go of the input."""
    deadline = perf_counter() + TIMEOUT_SECONDS
    while True:
        try:
            return one.unregister_system_shared_memory(key)
        except InferenceServerException as error:
            if "in use" not in error.message() or perf_counter() > deadline:
                raise
            sleep(0.01)


def _wire_type(array: np.ndarray) -> str:
    return triton_config.TYPES[array.dtype.name].removeprefix("TYPE_")


def proof(at: Endpoint, model: str, folder: Path, timeout: float) -> tuple[float, float]:
    """(relative L2 error, limit) of the answer to the request that a deployed version carries. Raises ServerError, or
    VerifyFailed beyond the limit, and for a version or an answer that cannot be compared.

    A response cache would go on with the right answer when the backend has long stopped: there another row goes along,
    which is another every time, where the model takes more than one.
    """
    try:
        limit = float(json.loads((folder / DEPLOYMENT).read_bytes())["limit"])
        with np.load(folder / PROOF, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
        raise VerifyFailed(f"version {folder.name} of model {model}", f"its {DEPLOYMENT} or {PROOF} cannot be read "
                           f"({type(error).__name__})", "those of its deployment", "deploy it again") from error
    feeds = {name.removeprefix("input/"): a for name, a in arrays.items() if name.startswith("input/")}
    truth = {name.removeprefix("output/"): a for name, a in arrays.items() if name.startswith("output/")}
    more = int(triton_config.read(folder / CONFIG).response_cache.enable
               and at.configuration(model).max_batch_size > len(next(iter(feeds.values()))))
    if more:
        rng = np.random.default_rng()
        feeds = {name: np.concatenate([a, rng.permutation(a[0].ravel()).reshape(a[:1].shape)])
                 for name, a in feeds.items()}
    with client(at, "grpc", model, feeds, timeout) as infer:
        worst = verify.furthest(_compared(infer(), truth, model, more)).relative_l2
    if not worst <= limit:
        raise VerifyFailed(f"model {model}", f"relative L2 error {worst:.1e} to its reference", f"at most {limit:.0e}")
    return worst, limit


def _compared(answer: Any, truth: Mapping[str, np.ndarray], model: str, more: int = 0) -> list[Comparison]:
    """`more`: rows after those that there is a truth of."""
    rows = []
    for name, expected in truth.items():
        found, wanted = answer.as_numpy(name), (len(expected) + more, *expected.shape[1:])
        if found is None or found.shape != wanted:
            raise VerifyFailed(f"model {model}", f"output {name} of shape {getattr(found, 'shape', None)}", str(wanted))
        rows.append(verify.compare(name, len(expected), found[:len(expected)], expected))
    return rows


# --- check -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """Requests of one kind. `status`: `passed` or `failed` with the reason; the worst of all outputs and requests."""

    model: str
    transport: str
    batch: int
    clients: int
    status: str
    reason: str
    relative_l2: float | None
    limit: float
    top1: float | None


def limit_of(config: Any) -> float:
    """Verify's, for the precision that a configuration names."""
    return verify.LIMITS.get(config.parameters[triton_config.PRECISION].string_value, verify.LIMITS["fp32"])


def check(at: Endpoint, config: Any, cases: Case, limit: float, transports: Sequence[str], progress: Progress
          ) -> tuple[Row, ...]:
    """The model that the server runs by `config` against the reference."""
    model, largest = config.name, config.max_batch_size
    preferred = tuple(config.dynamic_batching.preferred_batch_size)
    batches = sorted({1, *preferred, largest}) if largest else [_fixed(config, cases)]
    rows = []
    for transport in transports:
        for batch, clients in [(b, 1) for b in batches] + [(batches[0], AT_ONCE)]:
            progress(f"check {model}: {transport}, batch {batch}, clients {clients}")
            rows.append(_row(at, model, transport, int(batch), clients, cases, limit))
    return tuple(rows)


def _fixed(config: Any, cases: Case) -> int:
    """The batch of a model that is not batched: that of its shape, or of the reference if it is open."""
    dims = config.input[0].dims
    return int(dims[0]) if dims and dims[0] > 0 else len(next(iter(cases[0].values())))


def _row(at: Endpoint, model: str, transport: str, batch: int, clients: int, cases: Case, limit: float) -> Row:
    found: list[Comparison] = []
    reasons: list[str] = []

    def ask(first: int) -> None:
        rows = [{name: array[(first + np.arange(batch)) % len(array)] for name, array in part.items()}
                for part in cases]
        try:
            with client(at, transport, model, rows[0]) as infer:
                found.extend(_compared(infer(), rows[1], model))
        except EngineError as error:
            reasons.append(str(error))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worst = verify.furthest(found).relative_l2 if found else None
    if worst is not None and not worst <= limit:
        reasons.append(f"relative L2 error {worst:.2e}, limit {limit:.0e}")
    if not reasons and len(found) != clients * len(cases[1]):  # a thread ended by what nobody thought of
        reasons.append(f"{len(found)} answers of {clients * len(cases[1])}")
    return Row(model, transport, batch, clients, "failed" if reasons else "passed", "; ".join(reasons[:1]),
               None if worst is None or np.isnan(worst) else worst, limit, min((c.top1 for c in found), default=None))


def require(rows: Sequence[Row]) -> None:
    """Raises VerifyFailed that names the first request that failed."""
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        one = failed[0]
        raise VerifyFailed(f"{one.model} over {one.transport}, batch {one.batch}, {one.clients} clients", one.reason,
                           "", f"{len(failed)} of {len(rows)} kinds of request failed")


# --- load ------------------------------------------------------------------------------------------------------

def level(at: Endpoint, model: str, feeds: Mapping[str, np.ndarray], transport: str, clients: int, seconds: float
          ) -> Level:
    """Runs `clients` for `seconds`. Raises ServerError where the server does not answer at all."""
    samples: list[int] = []
    errors: Counter[str] = Counter()
    barrier, over = threading.Barrier(clients + 1), threading.Event()

    def work() -> None:
        try:
            with client(at, transport, model, feeds) as infer:
                _try(infer, errors, [])  # connects, and is not counted
                errors.clear()
                barrier.wait(TIMEOUT_SECONDS)
                while not over.is_set():
                    _try(infer, errors, samples)
        except (ServerError, InferenceServerException) as error:
            errors[str(error)] += 1
            barrier.abort()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        barrier.wait(TIMEOUT_SECONDS)
    except threading.BrokenBarrierError:
        over.set()
        for thread in threads:
            thread.join()
        raise ServerError(f"model {model} over {transport}", next(iter(errors), "no answer")) from None
    before, start, first = _statistics(at, model), perf_counter(), len(samples)
    over.wait(seconds)
    last, passed, after = len(samples), perf_counter() - start, _statistics(at, model)
    answered = tuple(samples[first:last])
    over.set()
    for thread in threads:
        thread.join()
    delta = {name: after[name] - before[name] for name in after}
    count = max(1.0, delta["success"])
    return Level(transport, clients, len(next(iter(feeds.values()))), passed, answered, dict(errors),
                 delta["images"] / max(1.0, delta["executions"]), *(delta[n] / count for n in (
                     "queue", "compute_input", "compute_infer", "compute_output")))


def _try(infer: Infer, errors: Counter[str], samples: list[int]) -> None:
    start = perf_counter_ns()
    try:
        infer()
    except ServerError as error:
        errors[str(error)] += 1
    else:
        samples.append(perf_counter_ns() - start)


def _statistics(at: Endpoint, model: str) -> dict[str, float]:
    """Sums over the versions of a model; times in nanoseconds."""
    found = at.statistics(model)
    rungs = ("queue", "compute_input", "compute_infer", "compute_output")
    sums = {name: float(sum(int(s["inference_stats"][name]["ns"]) for s in found)) for name in rungs}
    return sums | {"success": float(sum(int(s["inference_stats"]["success"]["count"]) for s in found)),
                   "images": float(sum(int(s["inference_count"]) for s in found)),
                   "executions": float(sum(int(s["execution_count"]) for s in found))}


def load(at: Endpoint, url: str, config: Any, manifest: Mapping[str, Any], cases: Case, clients: Sequence[int],
         transports: Sequence[str], seconds: float, folder: Path, progress: Progress) -> tuple[Load, Path]:
    """Measures every number of clients over every transport on the model that the server runs by `config`, and writes
    `loads/<id>.json`. Raises ServerError, and UsageError for a model with a response cache."""
    model = config.name
    if config.response_cache.enable:
        raise UsageError(f"model {model}", "has a response cache, which would answer the equal requests of a load test",
                         "a model without one", "deploy it without --response-cache to measure the engine")
    feeds = verify.cycled(cases[0], 1 if config.max_batch_size else _fixed(config, cases))
    machine = environment.capture("cpu")
    levels = []
    for transport in transports:
        for count in clients:
            progress(f"load {model}: {transport}, {count} clients")
            levels.append(level(at, model, feeds, transport, count, seconds))
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
    made = Load(name, model, manifest["files"]["model.onnx"],
                config.parameters[triton_config.ENGINE].string_value,
                config.parameters[triton_config.PRECISION].string_value, url,
                environment.command(), machine, tuple(levels))
    path = folder / f"{name}.json"
    workspace.put_text(path, json.dumps(asdict(made)) + "\n")
    return made, path
