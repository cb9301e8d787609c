"""Every network of the catalog becomes a TensorRT-RTX engine in every precision, with several profiles, on the CPU.

At small sizes, and without the dense layers of 100 million weights where a network has them: the operations are the
same, and a minute is enough for all.
"""

from __future__ import annotations

from pathlib import Path

import keras
import pytest

from engines.runtime import PRECISIONS, Profile
from export import catalog
from pipeline.build import Request, build
from pipeline.export import ExportRequest, export

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 has no wheel for this platform")
PLAIN = tuple(p for p in PRECISIONS if p != "fp8")  # which needs nvidia-modelopt
EDGES = {"alexnet": 95, "inception_v3": 107, "inception_resnet_v1": 107}


@pytest.mark.timeout(900)  # minutes on a busy machine
@pytest.mark.parametrize("name", catalog.NETWORKS)
def test_every_precision_and_several_profiles(name: str, tmp_path: Path) -> None:
    options = {"include_top": "false"} if catalog.NETWORKS[name].family in ("alexnet", "vgg") else {}
    edge = EDGES.get(name, 64)
    export(ExportRequest(name, tmp_path, size=(edge, edge), options=options, checks=False))
    keras.backend.clear_session()
    result = build(Request(name, tmp_path, ("tensorrt-rtx",), PLAIN,
                           profiles=(Profile(1, 1, 1), Profile(2, 8, 32))))
    assert [(row.precision, row.status) for row in result.rows] == [(p, "built") for p in PLAIN]
    sizes = {}
    for row in result.rows:
        assert row.receipt is not None
        assert set(row.receipt.layers) == {row.precision}
        assert row.receipt.tf32 is (row.precision == "tf32")
        sizes[row.precision] = row.receipt.size_bytes
    assert sizes["int8"] < sizes["fp32"]
    assert sizes["fp16"] < 0.7 * sizes["fp32"]
