"""Requests that no client of the small model should send, made from a seed: for HTTP as bytes, for gRPC as messages."""

from __future__ import annotations

import copy
import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

HEADER = "Inference-Header-Content-Length"
SECONDS = 20  # a request without an answer until then hangs
LARGEST = 32
Rng = np.random.Generator


@dataclass(frozen=True)
class Http:
    kind: str
    body: bytes
    header: str | None = None
    model: str = "small"

    def send(self, port: int) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        try:
            headers = {HEADER: self.header} if self.header is not None else {}
            connection.request("POST", f"/v2/models/{self.model}/infer", self.body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@dataclass(frozen=True)
class Grpc:
    kind: str
    message: Any

    def send(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> grpc.StatusCode:
        try:
            stub.ModelInfer(self.message, timeout=SECONDS)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK


# --- HTTP ------------------------------------------------------------------------------------------------------

def right(rng: Rng, rows: int | None = None) -> dict[str, Any]:
    """A request that is answered; a case changes one thing of it."""
    rows = rows or int(rng.integers(1, 5))
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 4],
                        "data": rng.normal(size=rows * 4).round(3).tolist()}]}


def binary(rng: Rng, array: np.ndarray | None = None) -> tuple[dict[str, Any], bytes]:
    array = rng.normal(size=(int(rng.integers(1, 5)), 4)).astype(np.float32) if array is None else array
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(array.shape),
                        "parameters": {"binary_data_size": array.nbytes}}]}, array.tobytes()


def _input(**changed: object) -> Callable[[Rng], dict[str, Any]]:
    def make(rng: Rng) -> dict[str, Any]:
        body = right(rng)
        body["inputs"][0] |= changed
        return body
    return make


def _word(rng: Rng) -> str:
    return "".join(map(chr, rng.integers(97, 123, int(rng.integers(2, 12)))))


def _shape(rng: Rng) -> list[int]:
    """Of another rank, with another last dimension, or with a negative one; its elements are as many as the data."""
    found = [int(n) for n in rng.integers(1, 9, int(rng.integers(1, 6)))]
    if rng.random() < 0.4:
        found[int(rng.integers(len(found)))] *= -1
    return found if len(found) != 2 or found[1] != 4 else [*found, 1]


def _shaped(rng: Rng) -> dict[str, Any]:
    shape = _shape(rng)
    return _input(shape=shape, data=[0.5] * abs(int(np.prod(shape))))(rng)


def _oversize(rng: Rng) -> dict[str, Any]:
    return right(rng, int(rng.integers(LARGEST + 1, 500)))


def _count(rng: Rng) -> dict[str, Any]:
    body = right(rng)
    data = body["inputs"][0]["data"]
    more = int(rng.integers(1, 4))
    body["inputs"][0]["data"] = data[:-more] if rng.random() < 0.5 else data + [0.5] * more
    return body


def _renamed(rng: Rng) -> dict[str, Any]:
    return _input(name=_word(rng))(rng)


def _retyped(rng: Rng) -> dict[str, Any]:
    types = ("FP64", "FP16", "BF16", "INT8", "INT32", "INT64", "UINT8", "BOOL", "BYTES", "fp32", "FLOAT", "",
             _word(rng))
    return _input(datatype=types[int(rng.integers(len(types)))])(rng)


def _unknown_output(rng: Rng) -> dict[str, Any]:
    return right(rng) | {"outputs": [{"name": _word(rng)}]}


def _infinite(rng: Rng) -> tuple[dict[str, Any], bytes]:
    array = rng.normal(size=(int(rng.integers(1, 5)), 4)).astype(np.float32)
    array[int(rng.integers(len(array))), int(rng.integers(4))] = (np.nan, np.inf, -np.inf)[int(rng.integers(3))]
    return binary(rng, array)


FIELDS: tuple[tuple[str, Callable[[Rng], dict[str, Any]]], ...] = (
    ("input name", _renamed), ("type", _retyped), ("shape", _shaped), ("batch", _oversize), ("count", _count),
    ("output name", _unknown_output),
    ("no inputs", lambda rng: {"inputs": []}), ("no inputs key", lambda rng: {}),
    ("an input too many", lambda rng: {"inputs": right(rng, 1)["inputs"] + _input(name="z")(rng)["inputs"]}),
    ("an input twice", lambda rng: {"inputs": right(rng, 1)["inputs"] * 2}),
    ("inputs not a list", lambda rng: {"inputs": ({}, "x", 3, None, True)[int(rng.integers(5))]}),
    ("input not an object", lambda rng: {"inputs": [([], "x", 3, None, True)[int(rng.integers(5))]]}),
    ("name not a string", lambda rng: _input(name=(1, None, [], {}, True)[int(rng.integers(5))])(rng)),
    ("type not a string", lambda rng: _input(datatype=(1, None, [], {}, True)[int(rng.integers(5))])(rng)),
    ("shape not a list", lambda rng: _input(shape=(1, None, "4", {}, True)[int(rng.integers(5))])(rng)),
    ("dimension not a number", lambda rng: _input(shape=[1, ("4", None, [], {}, 4.5)[int(rng.integers(5))]])(rng)),
    ("dimension beyond 64 bits", lambda rng: _input(shape=[2**64 + int(rng.integers(9)), 4])(rng)),
    ("data not a list", lambda rng: _input(shape=[1, 4], data=(1, None, "4", {}, True)[int(rng.integers(5))])(rng)),
    ("element not a number", lambda rng: _input(
        shape=[1, 4], data=[1, 2, 3, ("4", None, {}, True)[int(rng.integers(4))]])(rng)),
    ("no data", lambda rng: {"inputs": [{k: v for k, v in right(rng)["inputs"][0].items() if k != "data"}]}),
    ("no shape", lambda rng: {"inputs": [{k: v for k, v in right(rng)["inputs"][0].items() if k != "shape"}]}),
    ("no name", lambda rng: {"inputs": [{k: v for k, v in right(rng)["inputs"][0].items() if k != "name"}]}),
    ("no type", lambda rng: {"inputs": [{k: v for k, v in right(rng)["inputs"][0].items() if k != "datatype"}]}),
    ("id not a string", lambda rng: right(rng) | {"id": int(rng.integers(99))}),
    ("shared memory", lambda rng: _input(parameters={
        "shared_memory_region": _word(rng), "shared_memory_byte_size": 16})(rng)),
    ("empty batch", lambda rng: _input(shape=[0, 4], data=[])(rng)),
)


def http_cases(rng: Rng, rounds: int) -> Iterator[Http]:
    for _ in range(rounds):
        for kind, make in FIELDS:
            yield Http(kind, json.dumps(make(rng)).encode())
        yield from _texts(rng)
        yield from _bodies(rng)
        head, data = _infinite(rng)
        yield _joined("not finite", head, data)
        yield Http("model", json.dumps(right(rng)).encode(), model=_word(rng))
        yield Http("version", json.dumps(right(rng)).encode(), model=f"small/versions/{int(rng.integers(100, 999))}")


def _texts(rng: Rng) -> Iterator[Http]:
    """What is no JSON, or is no object."""
    text = json.dumps(right(rng)).encode()
    at = int(rng.integers(1, len(text) - 1))
    yield Http("cut JSON", text[:at])
    yield Http("JSON with more after it", text + b"]")
    yield Http("noise", rng.bytes(int(rng.integers(1, 200))))
    yield Http("noise in JSON", text[:at] + b"\xff\x00" + text[at:])
    yield Http("empty", b"")
    yield Http("another value", (b"[]", b"3", b'"x"', b"null", b"true")[int(rng.integers(5))])
    yield Http("a number too large", text.replace(b'"data": [', b'"data": [1e400, ', 1))
    yield Http("deep", b'{"inputs": ' + b"[" * int(rng.integers(50, 400)))


def _joined(kind: str, head: dict[str, Any], data: bytes) -> Http:
    text = json.dumps(head).encode()
    return Http(kind, text + data, str(len(text)))


def _bodies(rng: Rng) -> Iterator[Http]:
    """Binary data that is not what its header says."""
    head, data = binary(rng)
    size = head["inputs"][0]["parameters"]
    less = int(rng.integers(1, len(data)))
    yield _joined("data cut", head, data[:-less])
    yield _joined("data too long", head, data + rng.bytes(less))
    for kind, wrong in (("size too small", len(data) - less), ("size too large", len(data) + less),
                        ("size negative", -less), ("size not a number", "x")):
        changed = copy.deepcopy(head)
        changed["inputs"][0]["parameters"] = size | {"binary_data_size": wrong}
        yield _joined(kind, changed, data)
    text = json.dumps(head).encode()
    yield Http("header length too small", text + data, str(int(rng.integers(0, len(text)))))
    yield Http("header length too large", text + data, str(len(text) + len(data) + int(rng.integers(1, 99))))
    yield Http("header length in the data", text + data, str(len(text) + less))
    yield Http("header length negative", text + data, str(-less))
    yield Http("header length not a number", text + data, _word(rng))


# --- gRPC ------------------------------------------------------------------------------------------------------

def message(rng: Rng, array: np.ndarray | None = None, **changed: Any) -> Any:
    array = rng.normal(size=(int(rng.integers(1, 5)), 4)).astype(np.float32) if array is None else array
    made = service_pb2.ModelInferRequest(model_name="small", raw_input_contents=[array.tobytes()])
    made.inputs.add(**{"name": "x", "datatype": "FP32", "shape": array.shape} | changed)
    return made


def _raw(rng: Rng, *contents: bytes) -> Any:
    made = message(rng)
    del made.raw_input_contents[:]
    made.raw_input_contents.extend(contents)
    return made


def _typed(rng: Rng, field: str, values: list[Any], shape: tuple[int, ...] = (1, 4)) -> Any:
    """Data in the message's typed field, which may be another type's."""
    made = message(rng, shape=shape)
    del made.raw_input_contents[:]
    getattr(made.inputs[0].contents, field).extend(values)
    return made


def grpc_cases(rng: Rng, rounds: int) -> Iterator[Grpc]:
    for _ in range(rounds):
        word, less = _word(rng), int(rng.integers(1, 16))
        yield Grpc("input name", message(rng, name=word))
        yield Grpc("type", message(rng, datatype=json.loads(json.dumps(_retyped(rng)))["inputs"][0]["datatype"]))
        shape = _shape(rng)
        yield Grpc("shape", message(rng, np.ones(np.abs(shape), np.float32), shape=shape))
        yield Grpc("batch", message(rng, np.ones((int(rng.integers(LARGEST + 1, 500)), 4), np.float32)))
        yield Grpc("dimension too large", message(rng, shape=[int(rng.integers(2**32, 2**62)), 4]))
        yield Grpc("empty batch", message(rng, np.ones((0, 4), np.float32)))
        yield Grpc("data cut", _raw(rng, rng.bytes(16 - less)))
        yield Grpc("data too long", message(rng, np.ones((2, 4), np.float32), shape=[1, 4]))
        yield Grpc("no data", _raw(rng))
        yield Grpc("data twice", _raw(rng, rng.bytes(16), rng.bytes(16)))
        yield Grpc("elements of another type", _typed(rng, "int_contents", [1, 2, 3, 4]))
        yield Grpc("bytes for numbers", _typed(rng, "bytes_contents", [b"1", b"2", b"3", b"4"]))
        yield Grpc("too few elements", _typed(rng, "fp32_contents", [0.5] * int(rng.integers(1, 4))))
        yield Grpc("too many elements", _typed(rng, "fp32_contents", [0.5] * int(rng.integers(5, 40))))
        yield Grpc("not finite", message(rng, np.frombuffer(_infinite(rng)[1], np.float32).reshape(-1, 4)))
        both = message(rng)
        both.inputs[0].contents.fp32_contents.extend([0.5] * 4)
        yield Grpc("raw and typed data", both)
        none = message(rng)
        del none.inputs[:]
        yield Grpc("data of no input", none)
        del none.raw_input_contents[:]
        yield Grpc("no inputs", none)
        more = message(rng, np.ones((1, 4), np.float32))
        more.inputs.add(name=word, datatype="FP32", shape=[1, 4])
        more.raw_input_contents.append(bytes(16))
        yield Grpc("an input too many", more)
        output = message(rng)
        output.outputs.add(name=word)
        yield Grpc("output name", output)
        for kind, field, wrong in (("model", "model_name", word), ("version", "model_version", "77"),
                                   ("version not a number", "model_version", word), ("no model", "model_name", "")):
            other = message(rng)
            setattr(other, field, wrong)
            yield Grpc(kind, other)
        shared = _raw(rng)
        shared.inputs[0].parameters["shared_memory_region"].string_param = word
        shared.inputs[0].parameters["shared_memory_byte_size"].int64_param = 16
        yield Grpc("shared memory", shared)
