"""Writes an ONNX file without holding a second copy of the weights.

A protobuf message is a sequence of fields, and a nested message is a tag, its length and its bytes. So the nodes are
serialized by protobuf, and each weight follows as one more `initializer` field of the graph, its bytes straight from
the array. (Serializing 550 MB of weights through Python's protobuf takes 5 s and two more copies in memory.)
Wire format: https://protobuf.dev/programming-guides/encoding, field numbers: onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from export.errors import ModelError

LIMIT_BYTES = (1 << 31) - 1  # what protobuf parses


def write(model: ir.Model, path: Path) -> None:
    """Raises ModelError if the file would be larger than protobuf allows."""
    initializers = dict(model.graph.initializers)
    model.graph.initializers.clear()
    try:
        proto = ir.to_proto(model)
    finally:
        model.graph.initializers.update(initializers)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    heads = {name: _head(value) for name, value in initializers.items()}
    body = len(graph) + sum(len(head) + value.const_value.nbytes for (name, value), head in
                            zip(initializers.items(), heads.values(), strict=True) if value.const_value is not None)
    start = proto.SerializeToString(deterministic=True) + _tag(onnx.ModelProto, "graph", body)
    if len(start) + body > LIMIT_BYTES:
        raise ModelError(f"model {model.graph.name}", f"{(len(start) + body) / 1e9:.2f} GB in ONNX",
                         "less than 2.15 GB", "choose --outputs before the largest layers")
    with path.open("wb") as file:
        file.write(start)
        file.write(graph)
        for name, value in initializers.items():
            file.write(heads[name])
            file.writelines(_raw(value))


def _head(value: ir.Value) -> bytes:
    """Everything of one initializer field but the bytes of its `raw_data`."""
    assert value.const_value is not None and value.dtype is not None
    tensor = onnx.TensorProto(name=value.name, data_type=int(value.dtype), dims=value.const_value.shape.numpy())
    inner = tensor.SerializeToString(deterministic=True) + _tag(onnx.TensorProto, "raw_data", value.const_value.nbytes)
    return _tag(onnx.GraphProto, "initializer", len(inner) + value.const_value.nbytes) + inner


def _raw(value: ir.Value) -> Iterator[memoryview | bytes]:
    assert value.const_value is not None
    array = np.ascontiguousarray(value.const_value.numpy())
    yield array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() if array.ndim == 0 else array.data.cast("B")


def _tag(message: type, field: str, length: int) -> bytes:
    """Field number with wire type 2 (length-delimited), then `length`, both as varints."""
    number: int = message.DESCRIPTOR.fields_by_name[field].number  # type: ignore[attr-defined]
    return _varint(number << 3 | 2) + _varint(length)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])
