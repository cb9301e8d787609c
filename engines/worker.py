"""One runtime in one fresh process, driven over a pipe.

TensorFlow's and ONNX Runtime's GPU wheels bring different CUDA libraries under the same names, TensorFlow takes the
whole GPU, and thread pools fight for cores: a fair comparison, and a working one, needs a process for each.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Self

import numpy as np

from engines.errors import EngineError, FeedError
from engines.runtime import BuildRequest, Built, Differentiable, Prepared, backend

FORWARD = "forward"
PARTS = ("host_to_device", "compute", "device_to_host")


@dataclass(frozen=True)
class Timings:
    """Nanoseconds of each run: `wall` from the call until the output is on the host; `device` by CUDA events, if the
    runtime gives them, in `host_to_device`, `compute` and `device_to_host`."""

    wall: list[int]
    device: dict[str, list[int]]


def timed(prepared: Prepared, steps: int) -> Timings:
    """The measuring loop: nothing between the two readings of the clock but the call."""
    wall, parts = list[int](), list[tuple[float, ...]]()
    for _ in range(steps):
        start = perf_counter_ns()
        prepared()
        wall.append(perf_counter_ns() - start)
        parts.append(getattr(prepared, "times_ms", ()))
    told = zip(*parts, strict=True)
    return Timings(wall, {name: [round(ms * 1e6) for ms in column] for name, column in zip(PARTS, told, strict=False)})


class Worker:
    """A context manager: the process starts on entry and is gone after exit, whatever happened in it."""

    def __init__(self, request: BuildRequest) -> None:
        self.request = request
        context = multiprocessing.get_context("spawn")  # a fork would share the parent's runtimes and locks
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, request), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def build(self) -> Built:
        """Builds the request's engine in the process and loads it."""
        built: Built = self._call("build")
        return built

    def load(self, path: Path) -> None:
        """Loads an engine that is built."""
        self._call("load", path)

    def prepare(self, feeds: Mapping[str, np.ndarray], mode: str = FORWARD) -> dict[str, np.ndarray]:
        """Sets the shapes, values and mode of what is timed, runs it once, and returns the outputs."""
        outputs: dict[str, np.ndarray] = self._call("prepare", dict(feeds), mode)
        return outputs

    def time(self, steps: int) -> Timings:
        """Runs what was prepared `steps` times."""
        self.start_timing(steps)
        return self.finish_timing()

    def start_timing(self, steps: int) -> None:
        """The first half of time(): several processes are started before the first is waited for."""
        self._send("time", steps)

    def finish_timing(self) -> Timings:
        timings: Timings = self._receive("time")
        return timings

    def peak_bytes(self) -> int:
        """The largest resident size that the process has had."""
        peak: int = self._call("peak_bytes")
        return peak

    def _call(self, name: str, *arguments: Any) -> Any:
        self._send(name, *arguments)
        return self._receive(name)

    def _send(self, name: str, *arguments: Any) -> None:
        try:
            self._pipe.send((name, arguments))
        except OSError as error:
            raise self._died(name) from error

    def _receive(self, name: str) -> Any:
        """Raises the EngineError that the process raised, or one that says that it died."""
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died(name) from error
        if kind == "error":
            raise value
        if kind == "bug":
            raise RuntimeError(value)
        return value

    def _died(self, name: str) -> EngineError:
        self._process.join(10)
        return EngineError(f"{self.request.runtime} process", f"ended with {self._process.exitcode} in {name}", "",
                           "a negative number is a signal; 9 is what the system sends when memory runs out")


def _serve(pipe: Connection, request: BuildRequest) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process by the pipe
    if request.options.threads:
        os.environ["TF_NUM_INTRAOP_THREADS"] = str(request.options.threads)  # TensorFlow reads it once, at its start
    engine = _Engine(request)
    with contextlib.suppress(EOFError, OSError):  # the parent has gone, or needs nothing more
        while True:
            name, arguments = pipe.recv()
            pipe.send(_answer(engine, name, arguments))


def _answer(engine: _Engine, name: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "value", getattr(engine, name)(*arguments)
    except EngineError as error:
        return "error", _Carried(str(error), type(error))
    except Exception:
        return "bug", traceback.format_exc()


class _Carried(EngineError):
    """An error of the process, raised again here: pickle does not know the parts that its line was made of."""

    def __init__(self, text: str, kind: type[EngineError]) -> None:
        Exception.__init__(self, text)
        self.kind, self.exit_code = kind, kind.exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        return _Carried, (str(self), self.kind)


class _Engine:
    """What the process does for each call of Worker."""

    def __init__(self, request: BuildRequest) -> None:
        self.request = request

    def build(self) -> Built:
        module = backend(self.request.runtime)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"engine{module.SUFFIX}"
            built = module.build(self.request, path, lambda step: None)
            self.load(path)
        return Built(dict(built.layers), built.source, built.tf32, dict(built.details))

    def load(self, path: Path) -> None:
        self.runtime = backend(self.request.runtime).load(self.request, path)

    def prepare(self, feeds: dict[str, np.ndarray], mode: str) -> dict[str, np.ndarray]:
        if mode == FORWARD:
            self.prepared = self.runtime.prepare(feeds)
        elif isinstance(self.runtime, Differentiable):
            self.prepared = self.runtime.prepare_backward(feeds)
        else:
            raise FeedError(f"mode {mode}", f"{self.request.runtime} has no gradients", "tensorflow")
        self.prepared()
        return {name: array.copy() for name, array in self.prepared.outputs.items()}

    def time(self, steps: int) -> Timings:
        return timed(self.prepared, steps)

    def peak_bytes(self) -> int:
        status = Path("/proc/self/status")
        if status.exists():  # getrusage counts the parent's memory too, from between fork and exec
            line = next(line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
