"""Calibration data for int8: seeded inputs, images, or an .npy file of the model's inputs.

Labelled data is a folder with a folder of images for each class, or an .npz file with `images` and `labels`: the images
that are used are then drawn from the classes in turn, so that each has its share.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export import catalog, preprocess
from export.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
RANDOM_IMAGES = 8


def load(source: str, manifest: Mapping[str, Any], count: int, normalisation: str | None) -> dict[str, np.ndarray]:
    """Input name -> (count, ...) in the input's type. Raises UsageError that names what does not fit."""
    if source == "random":
        return _random(manifest)
    inputs, path = manifest["inputs"], Path(source)
    if len(inputs) != 1:
        raise UsageError(f"calibration data {source}", f"the model has {len(inputs)} inputs", "one",
                         "use --calibrate random")
    if not path.exists():
        raise UsageError(f"calibration data {source}", "no such file or folder",
                         "random, a folder of images, an .npy or an .npz file")
    array = _folder(path, manifest, count, normalisation) if path.is_dir() else _array(path, inputs[0], count)
    return {inputs[0]["name"]: array}


def _random(manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    from export.checks import seeded

    found = {}
    for spec in manifest["inputs"]:
        first, *rest = spec["shape"]
        batch = first if isinstance(first, int) else RANDOM_IMAGES
        found[spec["name"]] = seeded((batch, *rest), np.dtype(spec["dtype"]), 1)
    return found


def _in_turn(labels: Sequence[Any]) -> list[int]:
    """Indices, the first of each class before the second of any."""
    seen: Counter[Any] = Counter()
    places = []
    for i, label in enumerate(labels):
        places.append((seen[label], i))
        seen[label] += 1
    return [i for _, i in sorted(places)]


def _array(path: Path, spec: Mapping[str, Any], count: int) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        array, labels = (found["images"], found["labels"]) if isinstance(found, np.lib.npyio.NpzFile) else (found, None)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"calibration data {path}", "not an .npy file, nor an .npz file of images and labels",
                         "an array of the model's inputs") from error
    if labels is not None and labels.shape != array.shape[:1]:
        raise UsageError(f"calibration data {path}", f"labels {labels.shape} for images {array.shape}",
                         "one label for each image")
    wanted = tuple(spec["shape"][1:])
    if not isinstance(array, np.ndarray) or array.shape[1:] != wanted or array.dtype != spec["dtype"]:
        raise UsageError(f"calibration data {path}", f"{getattr(array, 'dtype', '?')} {getattr(array, 'shape', '?')}",
                         f"{spec['dtype']} (count, {', '.join(map(str, wanted))})")
    return np.array(array[:count] if labels is None else array[_in_turn(labels.tolist())[:count]])


def _folder(path: Path, manifest: Mapping[str, Any], count: int, normalisation: str | None) -> np.ndarray:
    """(count, height, width, 3), or channels first, resized to the input and normalised unless that takes uint8."""
    from PIL import Image, UnidentifiedImageError

    spec = manifest["inputs"][0]
    first = len(spec["shape"]) == 4 and spec["shape"][1] == 3
    size = spec["shape"][2:4] if first else spec["shape"][1:3]
    if len(spec["shape"]) != 4 or 3 not in (spec["shape"][1], spec["shape"][3]):
        raise UsageError(f"calibration data {path}", f"the model takes {spec['shape']}", "an RGB image",
                         "give an .npy file")
    files = [f for f in sorted((*path.iterdir(), *path.glob("*/*"))) if f.suffix.lower() in SUFFIXES]
    files = [files[i] for i in _in_turn([f.parent for f in files])[:count]]
    if not files:
        raise UsageError(f"calibration data {path}", "no images in it", f"files ending in {', '.join(SUFFIXES)}")
    pixels = []
    for file in files:
        try:
            with Image.open(file) as image:
                pixels.append(np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)))
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"calibration image {file}", "not readable", "an image", "leave it out") from error
    stacked = np.stack(pixels)
    if spec["dtype"] != "uint8":
        stacked = preprocess.apply(_normalisation(manifest, normalisation), stacked)
    return np.ascontiguousarray(np.moveaxis(stacked, -1, 1)) if first else stacked


def _normalisation(manifest: Mapping[str, Any], asked: str | None) -> str:
    known = catalog.NETWORKS.get(manifest["network"])
    name = preprocess.resolve(asked or "own", known.preprocess if known else None)
    if name is None:
        raise UsageError("preprocess none", "the model takes float32", "how its pixels are normalised",
                         f"one of {', '.join(preprocess.CHOICES[1:])}")
    return name
