"""The server's resizing against Pillow's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from export import resize


@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (97, 150), (300, 64), (48, 201), (20, 31), (11, 500)])
def test_it_is_pillows_bilinear(tmp_path: Path, size: tuple[int, int], nchw: bool) -> None:
    resize.write(tmp_path / "resize.onnx", "images", 48, 64, nchw)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    found = onnxruntime.InferenceSession(tmp_path / "resize.onnx", options).run(None, {"images": images})[0]
    right = np.stack([np.asarray(Image.fromarray(one).resize((64, 48), Image.Resampling.BILINEAR)) for one in images])
    found = found.transpose(0, 2, 3, 1) if nchw else found
    assert found.shape == right.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - right).max() <= 1
