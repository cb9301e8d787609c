"""Faults that a deployment survives, each against the real server: bad requests, bad models, switches under load,
signals, kills, and a disk that is full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import grpc
import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engines.errors import ServerError, VerifyFailed
from pipeline import deploy, model_repository, serve, triton_config
from tests.pipeline import malformed
from tests.pipeline.servers import PATIENCE, asked, eventually, free_ports, small, stubs

ROOT = Path(__file__).resolve().parents[2]
Deployed = tuple[deploy.Request, deploy.Result]
ROW = np.array([[0.5, -1.0, 2.0, 0.25]], np.float32)
RIGHT = ROW @ np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)  # by the weights of small()
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": ROW.ravel().tolist()}]})


# --- clients ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sent:
    """A request: when it was sent, the version that answered rightly, or what came instead."""

    at: float
    version: int = 0
    wrong: str = ""


@dataclass
class Clients:
    """Threads that send requests all the time, two over HTTP and two over gRPC."""

    http: int
    grpc: int
    sent: list[Sent] = field(default_factory=list)
    pending: dict[int, float] = field(default_factory=dict)  # thread -> when it sent what is not answered yet
    over: threading.Event = field(default_factory=threading.Event)

    def failed(self) -> list[Sent]:
        return [one for one in self.sent if one.wrong]

    def versions(self) -> set[int]:
        return {one.version for one in self.sent} - {0}

    def served(self, version: int, count: int = 20) -> None:
        """Waits for `count` answers more, until the last of each client is of this version."""
        start = len(self.sent)
        eventually(lambda: len(self.sent) >= start + count and {one.version for one in self.sent[-8:]} == {version},
                   f"version {version} answers; seen: {self.sent[-3:]}")

    def _run(self, ask: Callable[[], tuple[int, np.ndarray]]) -> None:
        me = threading.get_ident()
        while not self.over.is_set():
            at = self.pending[me] = time.monotonic()
            try:
                version, found = ask()
            except (OSError, HTTPException, grpc.RpcError, AssertionError) as error:
                self.sent.append(Sent(at, wrong=f"{type(error).__name__}: {error}"[:300]))
                time.sleep(0.02)
            else:
                near = found.shape == RIGHT.shape and np.allclose(found, RIGHT, rtol=1e-4, atol=1e-5)
                self.sent.append(Sent(at, version, "" if near else f"wrong numbers {found}"))
            del self.pending[me]

    def over_http(self) -> None:
        def ask() -> tuple[int, np.ndarray]:
            status, body = malformed.Http("right", BODY.encode()).send(self.http)
            assert status == 200, f"{status} {body!r}"
            answer = json.loads(body)
            return int(answer["model_version"]), np.array(answer["outputs"][0]["data"], np.float32).reshape(1, -1)
        self._run(ask)

    def over_grpc(self) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            message = service_pb2.ModelInferRequest(model_name="small", raw_input_contents=[ROW.tobytes()])
            message.inputs.add(name="x", datatype="FP32", shape=ROW.shape)

            def ask() -> tuple[int, np.ndarray]:
                answer = stub.ModelInfer(message, timeout=malformed.SECONDS)
                return int(answer.model_version), np.frombuffer(answer.raw_output_contents[0], np.float32)[None]
            self._run(ask)


@contextmanager
def clients(http: int, grpc_port: int) -> Iterator[Clients]:
    made = Clients(http, grpc_port)
    threads = [threading.Thread(target=work) for work in (made.over_http, made.over_grpc) * 2]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.over.set()
        for thread in threads:
            thread.join()


# --- requests --------------------------------------------------------------------------------------------------

# Answered by tritonserver 2.51's own HTTP front with 500, before our backend sees the request: its JSON library gives
# INTERNAL for whatever it cannot read, and the front makes 500 of that. Nothing of ours can change it. The message says
# what is wrong, and the request alone fails.
JSON_REFUSED = (b'{"error":"failed to parse the request JSON buffer:', b'{"error":"Unable to parse ')
# Answered by tritonserver 2.51's gRPC front as if the second tensor of raw data, which belongs to no input, were not
# there.
GRPC_ANSWERED = ("data twice",)
ROUNDS = 12


def test_malformed_requests_are_refused_and_hurt_no_one_else(deployed: Deployed, server: serve.Server) -> None:
    first, wrong, count = server.pid, Counter[str](), 0
    for case in malformed.http_cases(np.random.default_rng(13), ROUNDS):
        status, body = case.send(server.endpoint.http)
        count += 1
        if not (400 <= status < 500 or (status == 500 and body.startswith(JSON_REFUSED))):
            wrong[f"HTTP, {case.kind}: {status} {body[:80]!r}"] += 1
    with grpc.insecure_channel(f"127.0.0.1:{server.endpoint.grpc}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        refused = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        for message in malformed.grpc_cases(np.random.default_rng(14), ROUNDS):
            code = message.send(stub)
            count += 1
            if code not in refused and not (code is grpc.StatusCode.OK and message.kind in GRPC_ANSWERED):
                wrong[f"gRPC, {message.kind}: {code}"] += 1
    assert not wrong
    assert count >= 500
    deploy.check(asked(deployed[0], server)).require()
    assert server.pid == first


def test_after_a_request_that_ends_tritonserver_it_is_started_again(deployed: Deployed, server: serve.Server) -> None:
    """tritonserver 2.51 makes room for what a JSON shape announces before it counts the data; beyond all memory that
    ends the process. It happens before our backend sees the request."""
    first = server.pid
    data = json.loads(BODY)
    data["inputs"][0]["shape"] = [2**60, 4]
    with suppress(OSError):  # no answer: the connection is reset
        assert malformed.Http("huge", json.dumps(data).encode()).send(server.endpoint.http)[0] >= 400
    eventually(lambda: not server.endpoint.ready(), "it ends")
    server.watch()
    assert server.pid != first
    deploy.check(asked(deployed[0], server)).require()


def test_beside_a_corrupt_version_a_server_that_is_started_again_has_the_old_one(
        deployed: Deployed, server: serve.Server) -> None:
    folder, first = deployed[1].repository / "small", server.pid
    earlier = model_repository.live(folder)
    with _pushed(deployed[1].repository, lambda f: (f / "model.onnx").write_bytes(b"no model")):
        server.watch()
        os.kill(first, signal.SIGKILL)
        server.watch()
        assert server.pid != first
        assert server.endpoint.has(f"small/versions/{earlier}")
        deploy.check(asked(deployed[0], server)).require()
    server.watch()
    deploy.check(asked(deployed[0], server)).require()


@contextmanager
def _pushed(folder: Path, write: Callable[[Path], object]) -> Iterator[int]:
    """A new version, whose files `write` makes, that is live until the end of the block."""
    earlier, bad = model_repository.live(folder / "small"), max(model_repository.versions(folder / "small")) + 1
    config = triton_config.read(folder / "small/config.pbtxt")
    config.version_policy.specific.versions[:] = [bad]
    with model_repository.opened(folder) as repository:
        repository.put(repository.stage(config, write))
    yield bad
    with model_repository.opened(folder) as repository:
        assert earlier is not None
        repository.revert("small", earlier)


# --- versions under load ---------------------------------------------------------------------------------------

def _other(path: Path, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(small(path / "other.onnx", 7).read_bytes())


@pytest.mark.parametrize("kind", ["noise", "cut", "empty", "no file", "another model"])
def test_a_corrupt_version_pushed_under_load_fails_no_request(
        kind: str, deployed: Deployed, server: serve.Server, tmp_path: Path) -> None:
    repository_folder = deployed[1].repository
    model = (repository_folder / "small/1/model.onnx").read_bytes()
    write: dict[str, Callable[[Path], object]] = {
        "noise": lambda f: (f / "model.onnx").write_bytes(np.random.default_rng(0).bytes(300)),
        "cut": lambda f: (f / "model.onnx").write_bytes(model[:-40]),
        "empty": lambda f: (f / "model.onnx").write_bytes(b""), "no file": lambda f: None,
        "another model": lambda f: _other(tmp_path, f)}
    earlier, first = model_repository.live(repository_folder / "small"), server.pid
    assert earlier is not None
    with clients(server.endpoint.http, server.endpoint.grpc) as load:
        load.served(earlier)
        with _pushed(repository_folder, write[kind]) as bad:
            server.watch()
            assert not server.endpoint.has(f"small/versions/{bad}")
            assert server.endpoint.ready()  # what is in front of it goes on sending
            load.served(earlier)
        server.watch()
        load.served(earlier)
    assert load.failed() == []
    assert load.versions() == {earlier}
    assert server.pid == first


def test_a_corrupt_configuration_and_a_corrupt_model_beside_it_fail_no_request(
        deployed: Deployed, server: serve.Server) -> None:
    """Neither comes from deploy: somebody's hand did it."""
    folder, first = deployed[1].repository, server.pid
    config, earlier = folder / "small/config.pbtxt", model_repository.live(folder / "small")
    assert earlier is not None
    right = config.read_bytes()
    with clients(server.endpoint.http, server.endpoint.grpc) as load:
        load.served(earlier)
        shutil.copytree(folder / "small", folder / "beside")
        (folder / "beside/config.pbtxt").write_text(right.decode().replace('"small"', '"beside"'), "utf-8")
        (folder / f"beside/{earlier}/model.onnx").write_bytes(b"no model")
        config.write_bytes(b"max_batch_size: many")
        try:
            for _ in range(2):
                server.watch()
                load.served(earlier)
            assert not server.endpoint.has("beside")
        finally:
            shutil.rmtree(folder / "beside")
            config.write_bytes(right)
        server.watch()
        load.served(earlier)
    assert load.failed() == []
    assert server.pid == first


def test_a_first_start_beside_a_corrupt_live_version_serves_the_one_before(deployed: Deployed, tmp_path: Path) -> None:
    shutil.copytree(deployed[1].repository / "small", tmp_path / "copy/small")
    said: list[str] = []
    with _pushed(tmp_path / "copy", lambda f: (f / "model.onnx").write_bytes(b"no model")) as bad, \
            serve.started(serve.Request(tmp_path / "copy", *free_ports()), told=said.append) as running:
        assert running.endpoint.ready()
        assert not running.endpoint.has(f"small/versions/{bad}")
        deploy.check(asked(deployed[0], running)).require()
    assert said[0].startswith("small/config.pbtxt is not served:") and f"version {bad}" in said[0]
    assert "answers, relative L2 error" in said[1]


@pytest.mark.parametrize(("file", "data"), [("proof.npz", b"PK"), ("proof.npz", None), ("deployment.json", b"{")])
def test_a_version_whose_proof_is_damaged_is_not_served(
        file: str, data: bytes | None, deployed: Deployed, server: serve.Server) -> None:
    live, first = deployed[1].repository / "small/1", server.pid

    def damaged(folder: Path) -> None:
        shutil.copytree(live, folder, dirs_exist_ok=True)
        (folder / file).unlink() if data is None else (folder / file).write_bytes(data)

    with _pushed(deployed[1].repository, damaged) as bad:
        server.watch()
        assert not server.endpoint.has(f"small/versions/{bad}")
        deploy.check(asked(deployed[0], server)).require()
    server.watch()
    assert server.pid == first


def test_a_start_with_nothing_that_can_be_served(deployed: Deployed, tmp_path: Path) -> None:
    """No model that loads; then one that loads, and gives other numbers than it was deployed with."""
    shutil.copytree(deployed[1].repository / "small", tmp_path / "small")
    live = model_repository.live(tmp_path / "small")
    for version in model_repository.versions(tmp_path / "small"):
        if version != live:
            shutil.rmtree(tmp_path / f"small/{version}")
    request = serve.Request(tmp_path, *free_ports())
    (tmp_path / f"small/{live}/model.onnx").write_bytes(b"no model")
    with pytest.raises(ServerError, match="Protobuf parsing failed"), serve.started(request):
        pass
    other = onnx.load(small(tmp_path / "other.onnx"))
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 5), np.float32), "w"))
    onnx.save(other, tmp_path / f"small/{live}/model.onnx")
    with pytest.raises(VerifyFailed, match="relative L2 error"), serve.started(request):
        pass


def test_version_switches_and_rollbacks_under_load_fail_no_request(deployed: Deployed, server: serve.Server) -> None:
    request, first, live = deployed[0], server.pid, []
    with clients(server.endpoint.http, server.endpoint.grpc) as load:
        for action in (deploy.deploy, deploy.deploy, deploy.rollback, deploy.deploy, deploy.rollback):
            live.append(action(request).models["small"])
            server.watch()
            load.served(live[-1])
    assert load.failed() == []
    assert load.versions() >= set(live)
    assert len(set(live)) >= 3
    assert server.pid == first
    deploy.check(asked(request, server)).require()


# --- the command -----------------------------------------------------------------------------------------------

@dataclass
class Command:
    """`python -m pipeline.serve`, its ports, and the lines it has printed so far."""

    process: subprocess.Popen[str]
    ports: list[int]
    lines: list[str] = field(default_factory=list)

    def triton(self) -> psutil.Process:
        return next(p for p in psutil.Process(self.process.pid).children(True) if p.name() == "tritonserver")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(True)

    def shared(self) -> list[str]:
        return [path.name for path in Path("/dev/shm").glob(f"enginesmith_{self.process.pid}_*")]

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def _read(made: Command) -> None:
    assert made.process.stdout is not None
    for line in made.process.stdout:
        made.lines.append(line)


@contextmanager
def command(repository: Path, *options: str, says: str = "answers", cache: Path | None = None) -> Iterator[Command]:
    """The command once it serves, or `says` something else. A server that outlives it is ended with it."""
    ports = free_ports()
    named = zip(("--http-port", "--grpc-port", "--metrics-port"), map(str, ports), strict=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.serve", str(repository), *(word for pair in named for word in pair), *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | ({} if cache is None else {"XDG_CACHE_HOME": str(cache)}))
    made, family = Command(process, ports), []
    reader = threading.Thread(target=_read, args=(made,))
    reader.start()
    try:
        eventually(lambda: made.said(says) or process.poll() is not None, "the command serves")
        assert process.poll() is None, made.lines
        family = made.family()
        yield made
    finally:
        process.terminate()  # so that it leaves no shared memory, whatever the test found
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()
        process.wait()
        for left in family:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


def gone(made: Command, family: list[psutil.Process]) -> bool:
    return not any(_runs(p) for p in family) and all(_free(port) for port in made.ports)


def nothing_is_left(made: Command, family: list[psutil.Process]) -> None:
    """Of what was killed the kernel takes a moment to let go."""
    eventually(lambda: gone(made, family), f"still there: {family}", 5)
    assert made.shared() == []


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # ended between the two questions
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture
def slow(deployed: Deployed, tmp_path: Path) -> Path:
    """A repository whose model waits a second for others before it answers: there are always requests in flight."""
    copy = tmp_path / "slow"
    shutil.copytree(deployed[1].repository, copy)
    path = copy / "small/config.pbtxt"
    config = triton_config.read(path)
    config.dynamic_batching.max_queue_delay_microseconds = 1_000_000
    del config.dynamic_batching.preferred_batch_size[:]
    path.write_text(triton_config.text(config), "utf-8")
    return copy


def test_at_sigterm_requests_in_flight_are_answered_and_nothing_is_left(slow: Path) -> None:
    with command(slow) as made, clients(*made.ports[:2]) as load:
        family = made.family()
        eventually(lambda: len([one for one in load.sent if not one.wrong]) >= 8, f"answers: {load.sent[-2:]}")
        time.sleep(0.3)  # into a wait of a second
        eventually(lambda: len(load.pending) == 4, "a request of each is in flight")
        flying, at = dict(load.pending), time.monotonic()
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(PATIENCE) == 0, made.lines
        nothing_is_left(made, family)
        load.over.set()
    assert len(flying) == 4
    assert [one for one in load.sent if one.at < at and one.wrong] == []
    assert sum(one.at in flying.values() for one in load.sent) == 4  # and so answered
    assert made.said("stopping") and made.lines[-1].strip() == "stopped"


def test_sigterm_while_the_server_starts(slow: Path) -> None:
    """Its first proof takes a second, which is not interrupted."""
    with command(slow, says="start the server") as made:
        eventually(lambda: stubs(made.process.pid), "a backend")
        family = made.family()
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(PATIENCE) == 0, made.lines
        nothing_is_left(made, family)
    assert not made.said("Traceback") and made.lines[-1].strip() == "stopped"


def test_sigterm_in_the_middle_of_a_look(slow: Path) -> None:
    """A look takes a second here, and comes every tenth of one."""
    with command(slow, "--health-seconds", "0.1") as made:
        time.sleep(1.5)
        family = made.family()
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(PATIENCE) == 0, made.lines
        nothing_is_left(made, family)
    assert not made.said("again") and made.lines[-1].strip() == "stopped"


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_installation_ends_at_once(told: signal.Signals, deployed: Deployed, tmp_path: Path) -> None:
    repository = deployed[1].repository
    with command(repository, says="install", cache=tmp_path) as made:
        eventually(lambda: list(tmp_path.glob("enginesmith/triton-*/bin/python")), "an environment")
        with command(repository, says="look for", cache=tmp_path) as waiting:
            waiting.process.send_signal(told)
            assert waiting.process.wait(PATIENCE) == 0, waiting.lines
        assert waiting.lines[-1].strip() == "stopped" and not waiting.said("install")
        family = made.family()
        made.process.send_signal(told)
        assert made.process.wait(PATIENCE) == 0, made.lines
        nothing_is_left(made, family)
    assert made.lines[-1].strip() == "stopped" and not made.said("start")
    assert not list(tmp_path.rglob(".ready"))


def test_what_is_deployed_is_followed_at_once_and_ctrl_c_leaves_nothing(deployed: Deployed) -> None:
    with command(deployed[1].repository, "--health-seconds", "600") as made:
        version = deploy.deploy(deployed[0]).models["small"]
        eventually(lambda: made.said(f"small: version {version} answers"), "the new version is served")
        family = made.family()
        assert made.shared()
        made.process.send_signal(signal.SIGINT)
        assert made.process.wait(PATIENCE) == 0, made.lines
        nothing_is_left(made, family)
    assert made.said("stopping") and made.lines[-1].strip() == "stopped"


def test_a_killed_command_leaves_no_server(deployed: Deployed) -> None:
    with command(deployed[1].repository) as made:
        family = made.family()
        assert made.triton() in family
        made.process.kill()
        eventually(lambda: gone(made, family), "no server after a kill of its parent")
        eventually(lambda: made.shared() == [], f"no shared memory: {made.shared()}", 2)


def test_the_command_notices_a_killed_backend_under_load(deployed: Deployed) -> None:
    with command(deployed[1].repository, "--health-seconds", "0.5") as made, clients(*made.ports[:2]) as load:
        live = model_repository.live(deployed[1].repository / "small")
        assert live is not None
        load.served(live)
        first = made.triton()
        stubs(first.pid)[0].kill()
        eventually(lambda: made.said("started again"), "it is noticed")
        eventually(lambda: not first.is_running(), "the server that lost its backend ends")
        load.served(live)
        at = deploy.CheckRequest(deployed[0].model, deployed[0].out, None, f"http://127.0.0.1:{made.ports[0]}",
                                 made.ports[1])
        deploy.check(at).require()


# --- kills and a full disk -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("action", "fewest"), [("first", 12), ("deploy", 12), ("rollback", 2)])
def test_a_kill_at_any_moment_leaves_the_old_version_or_the_new(
        action: str, fewest: int, deployed: Deployed, tmp_path: Path) -> None:
    request = deploy.Request(deployed[0].model, tmp_path / "artifacts")
    shutil.copytree(deployed[0].out, request.out)
    for _ in range(9 if action == "rollback" else 0):
        deploy.deploy(request)
    ended = subprocess.run([sys.executable, "-m", "tests.pipeline.killed", request.model, str(request.out), action],
                           cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["kills"] >= fewest


LIMITED = ("import resource, runpy, sys; limit = int(sys.argv.pop(1)); "
           "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
           "runpy.run_module('pipeline.deploy', run_name='__main__')")


def test_a_disk_that_fills_leaves_the_repository_byte_for_byte(tmp_path: Path) -> None:
    request = deploy.Request(str(small(tmp_path / "small.onnx", 12_500)), tmp_path / "artifacts")
    repository = deploy.deploy(request).repository
    model = repository / "small/1/model.onnx"
    others = [path.stat().st_size for path in model.parent.iterdir() if path != model]
    limit = 100_000
    assert max(others) < limit < model.stat().st_size
    before = _bytes(repository)
    ended = subprocess.run([sys.executable, "-c", LIMITED, str(limit), request.model, "--out", str(request.out)],
                           cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    errors = [line for line in ended.stderr.splitlines() if not line.endswith(" ...")]  # without the steps
    assert len(errors) == 1 and errors[0].startswith("error:"), ended.stderr
    assert _bytes(repository) == before
    assert [path.name for path in repository.with_name(repository.name + ".staging").iterdir()] == [".lock"]
    assert deploy.deploy(request).models == {"small": 2}


def _bytes(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
