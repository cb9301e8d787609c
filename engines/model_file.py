"""What an ONNX file says of itself, read without its weights and without trusting it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from engines.errors import ModelFileError
from engines.runtime import TensorSpec


@dataclass(frozen=True)
class ModelFile:
    """`sha256` covers the file and every external data file it names."""

    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batch(self) -> int | None:
        """The batch size that the model is fixed to; None where it is open."""
        first = self.inputs[0].shape
        return first[0] if first else 1


def read(path: Path) -> ModelFile:
    """Raises ModelFileError for a file that is no whole ONNX model, or whose weights lie outside of its folder."""
    subject = f"model {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(subject, error.strerror or "not readable", "an .onnx file") from error
    if not data:
        raise ModelFileError(subject, "empty file", "an .onnx file")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelFileError(subject, "not an ONNX model, or cut short", "a whole .onnx file") from error
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise ModelFileError(subject, "no graph in it", "a whole .onnx file")
    digest = hashlib.sha256(data)
    for external in sorted(_external_files(model, path)):
        with external.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    weights = {tensor.name for tensor in model.graph.initializer}
    return ModelFile(path, digest.hexdigest(),
                     tuple(_spec(v, subject) for v in model.graph.input if v.name not in weights),
                     tuple(_spec(v, subject) for v in model.graph.output))


def _external_files(model: onnx.ModelProto, path: Path) -> set[Path]:
    """A location may not leave the folder: loading a model must not read what its author chooses elsewhere."""
    folder, found = path.parent.resolve(), set()
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        target = (folder / location).resolve()
        if not location or not target.is_relative_to(folder):
            raise ModelFileError(f"model {path}", f"weights of {tensor.name!r} at {location!r}",
                                 "external data inside of the model's folder")
        if not target.is_file():
            raise ModelFileError(f"model {path}", f"no file {location!r} beside it", "its external data file",
                                 "copy both files together")
        found.add(target)
    return found


def _spec(value: onnx.ValueInfoProto, subject: str) -> TensorSpec:
    kind = value.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except KeyError as error:
        raise ModelFileError(subject, f"{value.name!r} is no tensor", "tensors as inputs and outputs") from error
    return TensorSpec(value.name, dtype, tuple(d.dim_value if d.HasField("dim_value") else None
                                               for d in kind.shape.dim))
