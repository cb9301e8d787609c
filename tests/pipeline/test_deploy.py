"""A small model deployed, served by the real server, checked, killed, rolled back and stopped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines.errors import ServerError
from export.errors import CheckFailed, UsageError, WorkspaceError
from pipeline import capacity, deploy, model_repository, serve, served, triton_config, triton_lint, verify, workspace
from pipeline.capacity import Curve, Point
from tests.pipeline.servers import asked, eventually, free_ports, small, stubs, watching


def test_a_deployed_version_is_whole(deployed: tuple[deploy.Request, deploy.Result]) -> None:
    folder = deployed[1].repository / "small"
    config = triton_config.read(folder / "config.pbtxt")
    assert (config.max_batch_size, list(config.input[0].dims)) == (32, [4])
    assert {path.name for path in (folder / "1").iterdir()} == {
        "model.onnx", "config.pbtxt", "deployment.json", "proof.npz"}
    assert triton_lint.lint(folder, 1, triton_lint.Target()) == ()
    with pytest.raises(UsageError, match="no version before 1"):
        deploy.rollback(deployed[0])


def test_another_interface_is_refused_and_nothing_changes(deployed: tuple[deploy.Request, deploy.Result],
                                                          tmp_path: Path) -> None:
    _request, result = deployed
    before = {path: path.read_bytes() for path in result.repository.rglob("*") if path.is_file()}
    other = deploy.Request(str(small(tmp_path / "other.onnx", 7)), tmp_path / "out", result.repository, "small")
    with pytest.raises(CheckFailed, match="another --name"):
        deploy.deploy(other)
    assert {path: path.read_bytes() for path in result.repository.rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_the_repository(deployed: tuple[deploy.Request, deploy.Result],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    request, result = deployed
    before = sorted(result.repository.rglob("*"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkspaceError, match="free some space"):
        deploy.deploy(request)
    assert sorted(result.repository.rglob("*")) == before


def test_the_server_answers_as_the_reference(deployed: tuple[deploy.Request, deploy.Result],
                                             server: serve.Server) -> None:
    checked = deploy.check(asked(deployed[0], server, load=True, clients=(1, 4), seconds=1))
    checked.require()
    assert {row.batch for row in checked.rows} >= {1, 32}
    assert checked.load is not None
    assert {(one.transport, one.clients) for one in checked.load.levels} == {
        (transport, count) for transport in ("grpc", "http", "shared-memory") for count in (1, 4)}
    assert all(one.latency_ns and not one.errors for one in checked.load.levels)


def test_a_killed_backend_is_noticed_and_started_again(deployed: tuple[deploy.Request, deploy.Result],
                                                       server: serve.Server) -> None:
    first = server.pid
    stubs(first)[0].send_signal(signal.SIGKILL)
    assert server.endpoint.ready()  # the server's own word
    eventually(lambda: server.watch() or server.pid != first, "it is noticed")
    deploy.check(asked(deployed[0], server)).require()


def test_beside_a_corrupt_version_the_old_one_serves(deployed: tuple[deploy.Request, deploy.Result],
                                                     server: serve.Server) -> None:
    request, result = deployed
    with model_repository.opened(result.repository) as repository:
        config = triton_config.read(result.repository / "small/config.pbtxt")
        config.version_policy.specific.versions[:] = [9]
        repository.put(repository.stage(config, lambda f: (f / "model.onnx").write_bytes(b"no model")))
        server.watch()
        assert not server.endpoint.has("small/versions/9")
        deploy.check(asked(request, server)).require()
        repository.revert("small", 1)
    server.watch()
    assert model_repository.live(result.repository / "small") == 1
    deploy.check(asked(request, server)).require()


def test_a_version_with_other_numbers_than_its_proof_is_not_served(deployed: tuple[deploy.Request, deploy.Result],
                                                                   server: serve.Server, tmp_path: Path) -> None:
    request, result = deployed
    first, folder = server.pid, result.repository / "small"

    def other(version: Path) -> None:
        for name in (model_repository.DEPLOYMENT, model_repository.PROOF):
            (version / name).write_bytes((folder / "1" / name).read_bytes())
        (version / "model.onnx").write_bytes(ones(tmp_path))

    with model_repository.opened(result.repository) as repository:
        config = triton_config.read(folder / "config.pbtxt")
        config.version_policy.specific.versions[:] = [11]
        repository.put(repository.stage(config, other))
        server.watch()
        deploy.check(asked(request, server)).require()
        assert not server.endpoint.has("small/versions/11")
        repository.revert("small", 1)
    server.watch()
    assert server.pid == first
    deploy.check(asked(request, server)).require()


def test_a_new_version_is_followed(deployed: tuple[deploy.Request, deploy.Result], server: serve.Server) -> None:
    version = deploy.deploy(deployed[0]).models["small"]
    server.watch()
    assert server.endpoint.has(f"small/versions/{version}")
    deploy.check(asked(deployed[0], server)).require()


def test_a_fixed_batch_is_measured_and_served(tmp_path: Path) -> None:
    request = deploy.Request(str(small(tmp_path / "three.onnx", batch=3)), tmp_path, max_latency_ms=10_000,
                             server="kserve", storage_uri="s3://bucket/three")
    result = deploy.deploy(request)
    config = triton_config.read(result.repository / "three/config.pbtxt")
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [3, 4])
    assert not config.HasField("dynamic_batching")
    assert [(one.batch_size, list(one.inputs["x"].dims)) for one in config.model_warmup] == [(1, [3, 4])]
    assert result.choice is not None
    assert result.choice.images_per_second > 0
    assert result.service is not None
    with serve.started(serve.Request(result.repository, *free_ports())) as running:
        checked = deploy.check(asked(request, running, load=True, clients=(2,), transports=("grpc",), seconds=0.3))
    checked.require()
    assert {row.batch for row in checked.rows} == {3}
    assert checked.load is not None
    assert checked.load.levels[0].batch == 3


def test_the_version_before_is_the_one_that_was_live_before(deployed: tuple[deploy.Request, deploy.Result],
                                                            tmp_path: Path) -> None:
    request = replace(deployed[0], repository=tmp_path / "repository")
    for _ in range(3):
        deploy.deploy(request)
    assert deploy.rollback(replace(request, version=1)).models == {"small": 1}
    assert deploy.deploy(request).models == {"small": 4}
    assert deploy.rollback(request).models == {"small": 1}  # and not 3
    with pytest.raises(UsageError, match="no version before 1 to go back to; expected --version with one of 1, 2, 3"):
        deploy.rollback(request)


def spoiling(monkeypatch: pytest.MonkeyPatch, model: bytes) -> None:
    """From here on, what is put has another model than the lint has seen."""
    put = model_repository.Repository.put

    def spoiled(repository: model_repository.Repository, staged: Path) -> None:
        for path in staged.glob("*/model.onnx"):
            path.write_bytes(model)
        put(repository, staged)

    monkeypatch.setattr(model_repository.Repository, "put", spoiled)


def ones(folder: Path) -> bytes:
    """A model with the tensors of small(), and other numbers."""
    model = onnx.load(small(folder / "ones.onnx"))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 5), np.float32), "w"))
    return bytes(model.SerializeToString())


def test_reload_tells_the_server_and_takes_back_what_it_refuses(
        deployed: tuple[deploy.Request, deploy.Result], server: serve.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(deployed[0], reload=f"http://127.0.0.1:{server.endpoint.http}", grpc_port=server.endpoint.grpc)
    earlier = model_repository.live(deployed[1].repository / "small")
    with watching(server):
        version = deploy.deploy(request).models["small"]
        assert server.endpoint.has(f"small/versions/{version}")
        assert deploy.rollback(request).models == {"small": earlier}
        assert server.endpoint.has(f"small/versions/{earlier}")
        before = sorted(deployed[1].repository.rglob("*"))
        with monkeypatch.context() as patch, pytest.raises(ServerError, match=r"Protobuf.*the repository is as it was"):
            spoiling(patch, b"no model")
            deploy.deploy(request)
        assert sorted(deployed[1].repository.rglob("*")) == before
        deploy.check(asked(request, server)).require()
        again = deploy.deploy(request).models["small"]
        assert server.endpoint.has(f"small/versions/{again}")
        deploy.rollback(request)


def test_rollback_to_a_version_that_is_still_being_unloaded(deployed: tuple[deploy.Request, deploy.Result],
                                                             server: serve.Server) -> None:
    request = replace(deployed[0], reload=f"http://127.0.0.1:{server.endpoint.http}", grpc_port=server.endpoint.grpc)
    earlier = model_repository.live(deployed[1].repository / "small")
    assert earlier is not None
    with ThreadPoolExecutor() as pool:
        with watching(server):
            deploy.deploy(request)
        rollback = pool.submit(deploy.rollback, request)
        eventually(lambda: server.endpoint.states("small")[earlier][0] == "UNAVAILABLE", "it is unloaded")
        time.sleep(0.3)
        with watching(server):
            assert rollback.result().models == {"small": earlier}
    assert server.endpoint.has(f"small/versions/{earlier}")


@contextmanager
def plain(repository: Path, folder: Path) -> Iterator[served.Endpoint]:
    """A tritonserver on the repository itself, which loads what it is told to and proves nothing."""
    install = serve.installed(serve.Request(repository), folder, lambda step: None)
    http, grpc, metrics = free_ports()
    with subprocess.Popen(
            [*install.command, f"--model-repository={repository}", f"--http-port={http}", f"--grpc-port={grpc}",
             f"--metrics-port={metrics}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
             "--model-control-mode=explicit", "--load-model=*", "--allow-gpu-metrics=false"],
            env=install.variables, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        at = served.Endpoint("127.0.0.1", http, grpc, metrics)
        try:
            while not at.ready():
                assert process.poll() is None
                time.sleep(0.05)
            yield at
        finally:
            process.terminate()
            process.wait(30)


def test_reload_of_a_plain_server(deployed: tuple[deploy.Request, deploy.Result], tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(deployed[0], repository=tmp_path / "repository")
    deploy.deploy(request)
    (tmp_path / "server").mkdir()
    with plain(tmp_path / "repository", tmp_path / "server") as at:
        request = replace(request, reload=f"http://127.0.0.1:{at.http}", grpc_port=at.grpc)
        assert deploy.deploy(request).models == {"small": 2}
        assert at.has("small/versions/2") and not at.has("small/versions/1")
        before = sorted((tmp_path / "repository").rglob("*"))
        with monkeypatch.context() as patch:
            spoiling(patch, ones(tmp_path))
            for name in ("small", "fresh"):
                with pytest.raises(ServerError, match="relative L2 error"):
                    deploy.deploy(replace(request, name=name))
        assert sorted((tmp_path / "repository").rglob("*")) == before
        assert at.has("small/versions/2") and not at.has("fresh")
        assert deploy.rollback(request).models == {"small": 1}
        assert at.has("small/versions/1")
        (tmp_path / "repository/small/2/model.onnx").write_bytes(b"no model")
        with pytest.raises(ServerError, match=r"Protobuf.*the repository is as it was"):
            deploy.rollback(replace(request, version=2))
        assert model_repository.live(tmp_path / "repository/small") == 1
        assert at.has("small/versions/1")


@pytest.mark.parametrize("url", ["https://127.0.0.1:8000", "http://", "http://127.0.0.1:port"])
def test_reload_of_what_is_no_address_changes_nothing(url: str, deployed: tuple[deploy.Request, deploy.Result]) -> None:
    before = sorted(deployed[1].repository.rglob("*"))
    with pytest.raises(UsageError, match="not an address of a server"):
        deploy.deploy(replace(deployed[0], reload=url))
    assert sorted(deployed[1].repository.rglob("*")) == before


def test_a_server_that_hangs_up_passes_no_check() -> None:
    """Neither over HTTP nor over gRPC; and it is no server that could be told of a version."""
    cases = {"x": np.ones((2, 4), np.float32)}, {"y": np.ones((2, 5), np.float32)}
    config = triton_config.model_config_pb2.ModelConfig(name="small", max_batch_size=2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=_hang_up, args=(listening,))
        thread.start()
        at = served.Endpoint("127.0.0.1", port, port)
        rows = served.check(at, config, cases, 1e-4, ("http", "grpc"), lambda step: None)
        with pytest.raises(ServerError, match="a server that answers HTTP"):
            at.states("small")
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert {(row.transport, row.status) for row in rows} == {("http", "failed"), ("grpc", "failed")}
    assert all(row.reason for row in rows)


def _hang_up(listening: socket.socket) -> None:
    with suppress(OSError):  # closed
        while True:
            with listening.accept()[0] as one, suppress(ConnectionError):
                one.recv(16)


def test_what_is_no_number_is_further_than_any() -> None:
    right = np.ones((1, 2), np.float32)
    rows = [verify.compare("y", 1, found, right) for found in (right, right * np.nan, right * 2)]
    assert verify.furthest(rows) is rows[1]


def test_a_response_cache_that_comes_with_a_later_version(deployed: tuple[deploy.Request, deploy.Result],
                                                           server: serve.Server) -> None:
    version = deploy.deploy(replace(deployed[0], response_cache=True)).models["small"]
    server.watch()
    deploy.check(asked(deployed[0], server)).require()
    deploy.check(asked(deployed[0], server)).require()
    eventually(lambda: any(int(one["inference_stats"]["cache_hit"]["count"]) > 0
                           for one in server.endpoint.statistics("small") if one["version"] == str(version)),
               "nothing was answered from the cache")
    deploy.rollback(deployed[0])
    server.watch()


def test_a_damaged_configuration_is_mended_by_a_deployment(deployed: tuple[deploy.Request, deploy.Result],
                                                            tmp_path: Path) -> None:
    request = replace(deployed[0], repository=tmp_path / "repository")
    deploy.deploy(request)
    (tmp_path / "repository/small/config.pbtxt").write_text("max_batch_size: many")
    assert deploy.rollback(replace(request, version=1)).models == {"small": 1}
    (tmp_path / "repository/small/config.pbtxt").write_text("max_batch_size: many")
    assert deploy.deploy(request).models == {"small": 2}


@pytest.mark.parametrize("name", ["..", ".", "a/b", "-a", ""])
def test_names_that_are_none(name: str, deployed: tuple[deploy.Request, deploy.Result]) -> None:
    with pytest.raises(UsageError, match="not a name of a model"):
        deploy.deploy(replace(deployed[0], name=name))


def test_a_file_by_a_name_that_no_url_takes(deployed: tuple[deploy.Request, deploy.Result], server: serve.Server,
                                            tmp_path: Path) -> None:
    where = deployed[1].repository
    request = deploy.Request(str(small(tmp_path / "my net[1].onnx")), tmp_path / "out", where)
    assert deploy.deploy(request).models == {"my_net_1_": 1}
    server.watch()
    rows = deploy.check(asked(request, server)).rows
    assert {(row.transport, row.status) for row in rows} == {("grpc", "passed"), ("http", "passed")}
    assert deploy.deploy(request).models == {"my_net_1_": 2}
    assert deploy.rollback(request).models == {"my_net_1_": 1}
    shutil.rmtree(where / "my_net_1_")
    server.watch()


def test_the_working_folder_as_a_repository(deployed: tuple[deploy.Request, deploy.Result], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    deploy.deploy(replace(deployed[0], repository=Path()))
    assert {path.name for path in tmp_path.iterdir()} == {"here", "here.staging"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"small"}


def test_a_model_that_is_taken_out_is_let_go(deployed: tuple[deploy.Request, deploy.Result],
                                             server: serve.Server) -> None:
    first = server.pid
    deploy.deploy(replace(deployed[0], name="extra"))
    assert server.changed()
    server.watch()
    assert not server.changed()
    assert server.endpoint.has("extra")
    shutil.rmtree(deployed[1].repository / "extra")
    assert server.changed()
    server.watch()
    assert not server.changed()
    assert not server.endpoint.has("extra")
    away = deployed[1].repository.rename(deployed[1].repository.with_name("unmounted"))
    deployed[1].repository.mkdir()
    assert not server.changed()
    server.watch()
    deploy.check(asked(deployed[0], server)).require()
    deployed[1].repository.rmdir()
    away.rename(deployed[1].repository)
    server.watch()
    deploy.check(asked(deployed[0], server)).require()
    assert server.pid == first


def test_no_server(deployed: tuple[deploy.Request, deploy.Result]) -> None:
    with pytest.raises(ServerError, match=r"Connection refused.*pipeline\.serve DIR starts one"):
        deploy.check(deploy.CheckRequest(deployed[0].model, deployed[0].out, None, "http://127.0.0.1:9"))


def test_two_writers(tmp_path: Path) -> None:
    with model_repository.opened(tmp_path / "r"), pytest.raises(WorkspaceError, match="another enginesmith process"), \
            model_repository.opened(tmp_path / "r"):
        pass
    assert workspace.LOCK in {path.name for path in (tmp_path / "r.staging").iterdir()}


CURVE = Curve("", "", tuple(Point(b, 1, 2, ms * 1e6, ms * 1e6, b / ms * 1e3, 1) for b, ms in
                            ((1, 10), (2, 12), (4, 16), (8, 31), (16, 62))))


def test_the_limit_decides_the_batch() -> None:
    free, held = capacity.choose(CURVE, None, 1 << 30), capacity.choose(CURVE, 46, 1 << 30)
    assert (free.batching.max_batch, free.batching.preferred, free.in_flight) == (16, (8,), 16)
    assert (held.batching.max_batch, held.batching.preferred) == (2, (2,))  # three times 12 ms, and not three times 16
    assert held.in_flight == 6  # three batches of 2 in 36.8 of 46 ms
    assert capacity.choose(CURVE, 150, 1 << 30).in_flight == 8 * 3  # of 31 ms
    assert capacity.choose(CURVE, 13, 1 << 30).batching.max_batch == 1
    with pytest.raises(UsageError, match="a lone request takes"):
        capacity.choose(CURVE, 9, 1 << 30)


def test_requests_of_a_fixed_batch_run_one_after_another() -> None:
    one = Point(4, 1, 2, 20e6, 20e6, 200.0, 1)
    curve = Curve("", "", (one, Point(4, 2, 1, 25e6, 25e6, 320.0, 1)))
    free, held = (capacity.choose(curve, limit, 1 << 30, batched=False) for limit in (None, 100))
    assert free.batching == triton_config.Batching(0, instances=2, threads=1)
    assert (free.in_flight, held.in_flight) == (4, 6)  # three rounds of 25 ms in 80 of 100 ms
    assert capacity.choose(curve, 26, 1 << 30, batched=False).batching.instances == 1  # 25 ms hold it no more
    with pytest.raises(UsageError, match="a lone request takes"):
        capacity.choose(curve, 20, 1 << 30, batched=False)


@pytest.mark.parametrize(("gpu_bytes", "instances"), [(100, 2), (600, 1)])
def test_more_instances_have_to_fit_into_the_memory(gpu_bytes: int, instances: int) -> None:
    two = Point(1, 2, 2, 10e6, 10e6, 200.0, 1, gpu_bytes)
    curve = Curve("", "", (Point(1, 1, 2, 10e6, 10e6, 100.0, 1, 300), two))
    assert capacity.choose(curve, None, 1000).batching.instances == instances
