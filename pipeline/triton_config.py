"""Triton's `config.pbtxt`: the ModelConfig protobuf of tritonclient, printed by protobuf's text_format.

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engines.runtime import Profile, TensorSpec, missing, profile_shapes
from export.errors import UsageError

try:
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2 as model_config_pb2
except ImportError as error:
    raise missing("tritonclient", "deploy") from error

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
MODEL_FILES: Mapping[str, str] = MappingProxyType({"onnxruntime": "model.onnx", "tensorrt": "model.plan"})
# the runtime of an engine -> (backend, name of the GPU execution accelerator inside of it)
BACKENDS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "onnxruntime": ("onnxruntime", "cuda"), "onnxruntime-tensorrt": ("onnxruntime", "tensorrt"),
    "tensorrt": ("tensorrt", ""), "tensorrt-rtx": ("tensorrt", "")})
TYPES: Mapping[str, str] = MappingProxyType({
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64", "bfloat16": "TYPE_BF16"})
# parameters by which a deployed model says what it is, and what it came after; Triton's backends pass over them
PRECISION, ENGINE, BEFORE = "enginesmith.precision", "enginesmith.engine_sha256", "enginesmith.before"


@dataclass(frozen=True)
class Batching:
    """How requests are put together. `max_batch` 0: the model has a fixed batch, which is part of its shapes.

    `delay_us`: a request waits at most this long for others. There is no queue policy: with one, by time or by number,
    Triton 2.51 leaves requests in the queue of an idle server for half a second
    (https://github.com/triton-inference-server/server/issues/8870).
    """

    max_batch: int
    preferred: tuple[int, ...] = ()
    delay_us: int = 0
    instances: int = 1
    threads: int = 0


@dataclass(frozen=True)
class Served:
    """One model as a server is to run it. Shapes have the batch first."""

    name: str
    version: int
    runtime: str
    precision: str
    device: str
    engine_sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batching: Batching
    labels: bool = False
    response_cache: bool = False
    profiles: tuple[Profile, ...] = (Profile(),)
    workspace_bytes: int | None = None


def config(served: Served) -> Any:
    """The ModelConfig. Raises UsageError for a type that Triton has no name for."""
    backend, accelerator = BACKENDS[served.runtime]
    made = model_config_pb2.ModelConfig(name=served.name, backend=backend, max_batch_size=served.batching.max_batch)
    batched = served.batching.max_batch > 0
    made.input.extend(model_config_pb2.ModelInput(name=s.name, data_type=_type(s), dims=_dims(s, batched))
                      for s in served.inputs)
    made.output.extend(model_config_pb2.ModelOutput(name=s.name, data_type=_type(s), dims=_dims(s, batched))
                       for s in served.outputs)
    if served.labels:
        made.output[0].label_filename = f"{served.version}/{LABELS}"
    made.version_policy.specific.versions.append(served.version)
    _instances(made, served)
    _threads(made, served, backend)
    if accelerator and served.device != "cpu":
        settings = _cuda(served) if accelerator == "cuda" else _tensorrt(served)
        made.optimization.execution_accelerators.gpu_execution_accelerator.add(name=accelerator, parameters=settings)
    if batched:
        _batching(made, served.batching)
    for batch in sorted({1, *served.batching.preferred, served.batching.max_batch} - {0} if batched else {0}):
        _warm_up(made, served, batch)
    if served.response_cache:
        made.response_cache.enable = True
    made.parameters[PRECISION].string_value = served.precision
    made.parameters[ENGINE].string_value = served.engine_sha256
    return made


def _instances(made: Any, served: Served) -> None:
    kind, _, number = served.device.partition(":")
    plan = BACKENDS[served.runtime][0] == "tensorrt"  # built ahead of time on a CPU, it runs on a GPU all the same
    if kind == "cpu" and not plan:
        made.instance_group.add(count=served.batching.instances, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
        return
    group = made.instance_group.add(count=served.batching.instances,
                                    kind=model_config_pb2.ModelInstanceGroup.KIND_GPU)
    group.gpus.append(int(number or 0))
    if plan and len(served.profiles) > 1:
        group.profile.extend(str(i) for i in range(len(served.profiles)))


# what the engine was built and verified with, in the words of Triton's backend:
# https://github.com/triton-inference-server/onnxruntime_backend#onnx-runtime-with-tensorrt-optimization
def _cuda(served: Served) -> dict[str, str]:
    return {"use_tf32": str(int(served.precision == "tf32"))}  # which ONNX Runtime does unless it is told not to


def _tensorrt(served: Served) -> dict[str, str]:
    shapes = profile_shapes(served.profiles, {s.name: s.shape for s in served.inputs})
    found = {f"trt_profile_{bound}_shapes": text for bound, text in shapes.items()}
    if served.workspace_bytes is not None:
        found["max_workspace_size_bytes"] = str(served.workspace_bytes)
    return found


def _threads(made: Any, served: Served, backend: str) -> None:
    if backend == "onnxruntime" and served.device == "cpu":
        made.parameters["intra_op_thread_count"].string_value = str(served.batching.threads)
        made.parameters["inter_op_thread_count"].string_value = "1"


def _batching(made: Any, batching: Batching) -> None:
    made.dynamic_batching.preferred_batch_size.extend(batching.preferred)
    made.dynamic_batching.max_queue_delay_microseconds = batching.delay_us


def _warm_up(made: Any, served: Served, batch: int) -> None:
    request = made.model_warmup.add(name=f"batch {batch}" if batch else "fixed batch", batch_size=batch or 1)
    for spec in served.inputs:
        one = request.inputs[spec.name]
        one.data_type, one.zero_data = _type(spec), True  # random bits are no numbers
        one.dims.extend(n if n > 0 else 1 for n in _dims(spec, batch > 0))


def _type(spec: TensorSpec) -> int:
    if spec.dtype.name not in TYPES:
        raise UsageError(f"tensor {spec.name}", f"type {spec.dtype.name}", f"one of {', '.join(TYPES)}")
    number: int = model_config_pb2.DataType.Value(TYPES[spec.dtype.name])
    return number


def numpy_type(number: int) -> np.dtype:
    """The NumPy type of a number of Triton's DataType."""
    name = model_config_pb2.DataType.Name(number)
    return np.dtype(next(known for known, triton in TYPES.items() if triton == name))


def _dims(spec: TensorSpec, batched: bool) -> list[int]:
    return [-1 if n is None else n for n in (spec.shape[1:] if batched else spec.shape)]


def ensemble(name: str, version: int, steps: Sequence[Any]) -> Any:
    """The configurations `steps`, run one after another, as one model: the first output of each is the first input of
    the next. It takes as many images at a time as all of them do; labels are those of the last step.
    https://github.com/triton-inference-server/server/blob/main/docs/user_guide/ensemble_models.md"""
    made = model_config_pb2.ModelConfig(name=name, platform="ensemble",
                                        max_batch_size=min(step.max_batch_size for step in steps))
    for tensors, found in ((made.input, steps[0].input), (made.output, steps[-1].output)):
        for tensor in found:
            tensors.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    made.version_policy.specific.versions.append(version)
    for i, step in enumerate(steps):
        one = made.ensemble_scheduling.step.add(model_name=step.name, model_version=-1)
        for tensor in step.input:
            one.input_map[tensor.name] = tensor.name if i == 0 else f"between_{i}"
        for tensor in step.output:
            one.output_map[tensor.name] = tensor.name if i == len(steps) - 1 else f"between_{i + 1}"
    return made


def from_json(found: dict[str, Any]) -> Any:
    """What a server answers at `/v2/models/MODEL/config`; fields of other releases are passed over."""
    return json_format.ParseDict(found, model_config_pb2.ModelConfig(), ignore_unknown_fields=True)


def text(made: Any) -> str:
    printed: str = text_format.MessageToString(made)
    return printed


def read(path: Path) -> Any:
    """Raises UsageError that names the line which is not what ModelConfig says."""
    subject = f"configuration {path}"
    try:
        return text_format.Parse(path.read_text("utf-8"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise UsageError(subject, re.sub(r"\s+", " ", str(error)), "Triton's ModelConfig", "deploy it again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(subject, getattr(error, "strerror", None) or "not text", "Triton's ModelConfig",
                         "deploy it again") from error
