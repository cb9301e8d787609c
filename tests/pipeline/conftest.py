"""A deployed model and its server, once for each module that asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline import deploy, serve
from tests.pipeline.servers import free_ports, small


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[deploy.Request, deploy.Result]:
    folder = tmp_path_factory.mktemp("deploy")
    request = deploy.Request(str(small(folder / "small.onnx")), folder / "artifacts")
    return request, deploy.deploy(request)


@pytest.fixture(scope="module")
def server(deployed: tuple[deploy.Request, deploy.Result]) -> Iterator[serve.Server]:
    with serve.started(serve.Request(deployed[1].repository, *free_ports(), health_seconds=1)) as running:
        yield running
