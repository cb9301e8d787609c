"""A catalog network that takes raw pixels: deployed with its ensemble, labels and response cache, rolled back, served.

Everything goes through the command line, and the real server.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from pipeline import serve, served, triton_config
from tests.pipeline.servers import eventually, free_ports, watching
from tests.pipeline.test_build_verify import run

NAME, CLASSES = "resnet_v2_18", 10


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    labels = folder / "names.txt"
    labels.write_text("".join(f"class {i}\n" for i in range(CLASSES)), "utf-8")
    assert run("export", NAME, "--size", "64", "--classes", CLASSES, "--preprocess", "own", "--out", folder) == 0
    deploy = ("deploy", NAME, "--out", folder, "--labels", labels, "--response-cache")
    assert run(*deploy) == 0
    assert run(*deploy) == 0
    assert run("deploy", NAME, "--out", folder, "--rollback") == 0
    return folder


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[serve.Server]:
    with serve.started(serve.Request(out / NAME, *free_ports())) as running:
        yield running


@pytest.fixture
def client(server: serve.Server) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.endpoint.grpc}") as one:
        yield one


def image(pixels: np.ndarray) -> list[tritonclient.grpc.InferInput]:
    made = tritonclient.grpc.InferInput("images", pixels.shape, "UINT8")
    made.set_data_from_numpy(pixels)
    return [made]


def test_what_was_rolled_back_to_is_live(out: Path) -> None:
    repository = out / NAME / "model_repository"
    live = triton_config.read(repository / NAME / "config.pbtxt").version_policy.specific.versions
    assert list(live) == [1]
    assert (repository / NAME / "2/model.onnx").exists()
    # the models beside it have not changed, and got no second version
    assert {p.name for p in (repository / f"{NAME}_resize").iterdir()} == {"1", "config.pbtxt"}


def test_the_network_and_its_ensemble_are_the_reference(out: Path, server: serve.Server,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("deploy", NAME, "--out", out, "--check", f"http://127.0.0.1:{server.endpoint.http}",
               "--grpc-port", server.endpoint.grpc, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["model"] for row in rows} == {NAME, f"{NAME}_image"}
    assert all(row["status"] == "passed" and row["relative_l2"] < 1e-4 for row in rows)


def test_numbers_beyond_the_limit_end_with_code_3(out: Path, server: serve.Server,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", NAME, "--out", out, "--check", f"http://127.0.0.1:{server.endpoint.http}",
               "--grpc-port", server.endpoint.grpc, "--max-error", 0) == 3
    said = capsys.readouterr()
    assert "failed" in said.out and said.err.splitlines()[-1].startswith("error: resnet_v2_18")


def test_the_metrics_count_the_same_batches(server: serve.Server,
                                            client: tritonclient.grpc.InferenceServerClient) -> None:
    """The average batch of a load test is by the server's statistics; its Prometheus metrics say the same."""
    from urllib.request import urlopen

    def metrics() -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{server.endpoint.metrics}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {name: sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="{NAME}",'))
                for name in ("nv_inference_count", "nv_inference_exec_count")}

    def statistics() -> dict[str, float]:
        stats = client.get_inference_statistics(NAME).model_stats
        return {"nv_inference_count": sum(one.inference_count for one in stats),
                "nv_inference_exec_count": sum(one.execution_count for one in stats)}

    client.infer(NAME, image(np.zeros((1, 64, 64, 3), np.uint8)))
    eventually(lambda: metrics() == statistics() and all(metrics().values()), "the metrics differ")  # see `ran`


def test_an_image_of_another_size_is_resized(client: tritonclient.grpc.InferenceServerClient) -> None:
    """A plain colour stays that colour at any size, so the answers are the same."""
    colour = np.array([30, 200, 90], np.uint8)
    right, wide = (client.infer(f"{NAME}_image", image(np.full((1, *size, 3), colour))).as_numpy("logits")
                   for size in ((64, 64), (97, 150)))
    other = client.infer(f"{NAME}_image", image(np.full((1, 97, 150, 3), colour[::-1]))).as_numpy("logits")
    np.testing.assert_allclose(wide, right, rtol=1e-3, atol=1e-4)
    assert np.abs(other - right).max() > 1e-3


@pytest.mark.parametrize("model", [NAME, f"{NAME}_image"])
def test_classes_have_their_labels(client: tritonclient.grpc.InferenceServerClient, model: str) -> None:
    asked = [tritonclient.grpc.InferRequestedOutput("logits", class_count=3)]
    pixels = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), np.uint8)
    found = client.infer(model, image(pixels), outputs=asked).as_numpy("logits")[0]
    logits = client.infer(model, image(pixels)).as_numpy("logits")[0]
    best = np.argsort(-logits)[:3]
    assert [text.decode().split(":")[1:] for text in found] == [[str(i), f"class {i}"] for i in best]


def test_an_equal_request_is_answered_from_the_cache(client: tritonclient.grpc.InferenceServerClient) -> None:
    def hits() -> int:
        return int(client.get_inference_statistics(NAME).model_stats[0].inference_stats.cache_hit.count)

    pixels = np.random.default_rng(2).integers(0, 256, (1, 64, 64, 3), np.uint8)
    before, first = hits(), client.infer(NAME, image(pixels)).as_numpy("logits")
    again = client.infer(NAME, image(pixels)).as_numpy("logits")
    eventually(lambda: hits() == before + 1, "not answered from the cache")
    np.testing.assert_array_equal(again, first)


def test_the_probe_of_health_is_not_answered_from_the_cache(
        server: serve.Server, client: tritonclient.grpc.InferenceServerClient) -> None:
    def ran() -> int:  # counted only after the answer has been sent
        return int(client.get_inference_statistics(NAME).model_stats[0].execution_count)

    def probe(model: str) -> None:
        before = ran()
        error, limit = served.proof(server.endpoint, model, server.rendered / NAME / "1", 10)
        assert error < limit
        eventually(lambda: ran() == before + 1, f"{model}: answered from the cache")

    for model in (NAME, f"{NAME}_image"):
        probe(model)
        probe(model)


def test_a_load_test_of_a_cache_is_refused(out: Path, server: serve.Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", NAME, "--out", out, "--check", f"http://127.0.0.1:{server.endpoint.http}",
               "--grpc-port", server.endpoint.grpc, "--load") == 1
    assert "deploy it without --response-cache" in capsys.readouterr().err


def test_an_ensemble_that_is_not_served_is_no_passed_check(out: Path, server: serve.Server,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    server.endpoint.unload(f"{NAME}_image")
    assert run("deploy", NAME, "--out", out, "--check", f"http://127.0.0.1:{server.endpoint.http}",
               "--grpc-port", server.endpoint.grpc, "--transport", "http") == 1
    assert f"{NAME}_image" in capsys.readouterr().err
    assert server.endpoint.load(f"{NAME}_image") is None


def test_to_int8_with_smaller_batches_and_back_under_load(out: Path, server: serve.Server,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    """Clients of the network and of its ensemble notice nothing: an ensemble may not take more than its network does,
    at no moment."""
    first, over, failed, answered = server.pid, threading.Event(), list[str](), Counter[str]()

    def work(model: str) -> None:
        pixels = np.random.default_rng(3)
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.endpoint.grpc}") as one:
            while not over.is_set():
                try:
                    one.infer(model, image(pixels.integers(0, 256, (1, 64, 64, 3), np.uint8)))
                except InferenceServerException as error:
                    failed.append(f"{model}: {error}")
                answered[model] += 1

    def checked() -> set[tuple[str, float, str]]:
        capsys.readouterr()
        assert run("deploy", NAME, "--out", out, "--check", f"http://127.0.0.1:{server.endpoint.http}",
                   "--grpc-port", server.endpoint.grpc, "--json") == 0
        return {(row["model"], row["limit"], row["status"]) for row in json.loads(capsys.readouterr().out)["rows"]}

    models = NAME, f"{NAME}_image"
    reload = "--reload", f"http://127.0.0.1:{server.endpoint.http}", "--grpc-port", server.endpoint.grpc
    largest = [server.endpoint.configuration(model).max_batch_size for model in models]
    assert run("build", NAME, "--out", out, "--precision", "int8", "--profile", "1,4,8") == 0
    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    try:
        with watching(server):
            assert run("deploy", NAME, "--out", out, "--precision", "int8", *reload) == 0
        assert checked() == {(model, 0.1, "passed") for model in models}
        assert [server.endpoint.configuration(model).max_batch_size for model in models] == [8, 8]
        with watching(server):
            assert run("deploy", NAME, "--out", out, "--rollback", *reload) == 0
        assert checked() == {(model, 1e-4, "passed") for model in models}
        assert run("deploy", NAME, "--out", out) == 0  # which the ensemble grows with again
        server.watch()
        assert [server.endpoint.configuration(model).max_batch_size for model in models] == largest
        assert run("deploy", NAME, "--out", out, "--rollback", "--version", "3") == 0
        server.watch()
        assert checked() == {(model, 0.1, "passed") for model in models}
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert min(answered[model] for model in models) > 10
    assert server.pid == first


def test_labels_of_another_length_are_refused(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n", "utf-8")
    before = sorted((out / NAME / "model_repository").rglob("*"))
    assert run("deploy", NAME, "--out", out, "--labels", short) == 3
    assert "2 lines; expected 10 lines" in capsys.readouterr().err
    assert sorted((out / NAME / "model_repository").rglob("*")) == before
