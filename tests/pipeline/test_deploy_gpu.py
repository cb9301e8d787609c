"""Engines deployed on a GPU; and served, where an installed tritonserver is on the PATH. `make test-gpu`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline import deploy, serve, triton_config
from tests.pipeline.servers import asked, free_ports, small

pytestmark = pytest.mark.gpu
TRITONSERVER = Path(shutil.which("tritonserver") or "")


@pytest.fixture(params=["tensorrt", "onnxruntime", "onnxruntime-tensorrt"])
def deployed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[deploy.Request, deploy.Result]:
    wish = deploy.Request(str(small(tmp_path / "small.onnx")), tmp_path / "out", runtime=request.param, device="cuda:0",
                          max_latency_ms=50)
    return wish, deploy.deploy(wish)


def test_it_is_measured_and_has_no_error(deployed: tuple[deploy.Request, deploy.Result]) -> None:
    _request, result = deployed
    assert result.choice is not None and result.choice.images_per_second > 0 and result.choice.memory_bytes > 0
    assert [f for f in result.findings if f.level == "error"] == []
    config = triton_config.read(result.repository / "small/config.pbtxt")
    assert list(config.instance_group[0].gpus) == [0]


@pytest.mark.skipif(not TRITONSERVER.name, reason="no tritonserver with a GPU on the PATH")
def test_it_is_served_and_is_the_reference(deployed: tuple[deploy.Request, deploy.Result]) -> None:
    request, result = deployed
    with serve.started(serve.Request(result.repository, *free_ports(), tritonserver=TRITONSERVER)) as server:
        deploy.check(asked(request, server, load=True, clients=(1, 8), seconds=0.5)).require()
