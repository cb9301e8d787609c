"""Top-1 accuracy of engines on held-out data: resnet_v2_18 trained on scikit-learn's digits, in every precision.

    python -m benchmarks.accuracy [--epochs 12] [--size 33]

The 8x8 digits are upscaled by nearest neighbour; 1,297 train the network, 500 are held out. The int8 engines are
calibrated on training images. Needs scikit-learn for the data.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import described, save
from engines.runtime import BuildRequest, Profile, backend
from pipeline import build as build_stage
from pipeline.export import ExportRequest, export

RUNTIMES, PRECISIONS = ("onnxruntime", "openvino"), ("fp32", "fp16", "bf16", "int8")
HELD_OUT = 500


def digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, size, size, 3) in [-1, 1] and labels, in a seeded order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    where = np.arange(size) * 8 // size
    images = data.images[order][:, where][:, :, where] / 8 - 1
    return np.repeat(images[..., None], 3, -1).astype(np.float32), data.target[order]


def train(images: np.ndarray, labels: np.ndarray, epochs: int, size: int, path: Path) -> float:
    """Writes a .weights.h5; the seconds it took."""
    from export import catalog, networks, weights
    from export.quiet import load_tensorflow

    load_tensorflow()
    import keras

    config = catalog.configure("resnet_v2_18", (size, size), 10)
    whole = networks.build(config)
    weights.load(whole, config, "random", 0)
    model = keras.Model(whole.input, whole.output["logits"])
    keras.utils.set_random_seed(0)
    steps = epochs * len(images) // 64
    rate = keras.optimizers.schedules.CosineDecay(0.05, steps)
    model.compile(keras.optimizers.SGD(rate, 0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    start = time.perf_counter()
    model.fit(images, labels, batch_size=64, epochs=epochs, verbose=2)
    # the networks' batch norms have a long momentum: the averages of a few hundred steps need the data once more
    for layer in whole.layers:
        if hasattr(layer, "momentum"):
            layer.momentum = 0.8
    for first in range(0, len(images), 128):
        model(images[first:first + 128], training=True)
    whole.save_weights(path)
    return time.perf_counter() - start


def accuracy(row: build_stage.Row, folder: Path, images: np.ndarray, labels: np.ndarray) -> float:
    assert row.receipt is not None
    request = BuildRequest(folder / "model.onnx", row.runtime, row.precision, profiles=(Profile(1, 50, 50),))
    with backend(row.runtime).load(request, folder / "engines" / row.receipt.file) as engine:
        found = [engine.run({"images": images[i:i + 50]})["logits"].argmax(1) for i in range(0, len(images), 50)]
    return float(np.mean(np.concatenate(found) == labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=33)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy.json"))
    asked = parser.parse_args()
    images, labels = digits(asked.size)
    training, test = (images[HELD_OUT:], labels[HELD_OUT:]), (images[:HELD_OUT], labels[:HELD_OUT])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = train(*training, asked.epochs, asked.size, folder / "digits.weights.h5")
        exported = export(ExportRequest("resnet_v2_18", folder, weights=str(folder / "digits.weights.h5"), classes=10,
                                        size=(asked.size, asked.size)))
        np.save(folder / "calibration.npy", training[0][:256])
        built = build_stage.build(build_stage.Request(
            "resnet_v2_18", folder, RUNTIMES, PRECISIONS, calibrate=str(folder / "calibration.npy"), images=256,
            profiles=(Profile(1, 50, 50),)))
        rows: list[dict[str, Any]] = []
        for row in built.rows:
            top1 = None if row.receipt is None else accuracy(row, exported.folder, *test)
            rows.append({"runtime": row.runtime, "precision": row.precision, "status": row.status, "top1": top1,
                         "why": row.why if row.receipt is None else ""})
            print(f"{row.runtime:12s} {row.precision:5s} {'refused' if top1 is None else f'{top1:.1%}'}", flush=True)
    save(asked.out, described("accuracy") | {"training_seconds": round(seconds, 1), "held_out": HELD_OUT, "rows": rows})


if __name__ == "__main__":
    main()
