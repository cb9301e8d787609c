"""A small model, and what is needed to serve and to ask it in a test."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from pipeline import deploy, serve

PATIENCE = 120.0  # seconds until something that is waited for counts as failed


def small(path: Path, width: int = 5, batch: int | str = "batch") -> Path:
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, width)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, width])], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def free_ports() -> list[int]:
    """Three that were free a moment ago."""
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for probe in (one, two, three):
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in (one, two, three)]


def eventually(found: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def stubs(pid: int) -> list[psutil.Process]:
    """The backend processes below a server, or below what started it."""
    with suppress(psutil.NoSuchProcess):  # ended meanwhile
        return [p for p in psutil.Process(pid).children(True) if "stub" in " ".join(p.cmdline())]
    return []


def asked(request: deploy.Request, server: serve.Server, **more: object) -> deploy.CheckRequest:
    at = server.endpoint
    return deploy.CheckRequest(request.model, request.out, None, f"http://127.0.0.1:{at.http}", at.grpc,
                               **more)  # type: ignore[arg-type]


@contextmanager
def watching(server: serve.Server) -> Iterator[None]:
    """The server looks after itself, as in the command."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.2):
            server.watch()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
