"""Looks a model folder of a Triton repository over before it ships: what the server would refuse, or hide.

Each check is a function of the configuration and the engine's own shapes; CHECKS lists them all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import model_file
from engines.errors import ModelFileError
from engines.runtime import TensorSpec
from export.errors import UsageError
from pipeline import triton_config, triton_releases
from pipeline.model_repository import DEPLOYMENT
from pipeline.triton_config import CONFIG, MODEL_FILES, model_config_pb2

GPU_KIND = model_config_pb2.ModelInstanceGroup.KIND_GPU


@dataclass(frozen=True)
class Target:
    """The server that the model is for. Unknown values are None; `release`: of Triton's container, such as `25.01`."""

    gpu: bool = False
    release: str | None = None
    compute_capability: str | None = None
    gpu_memory_bytes: int | None = None


@dataclass(frozen=True)
class Finding:
    """`level`: `error` or `warning`; `file` is relative to the repository; `mend`: what to change."""

    level: str
    file: str
    field: str
    found: str
    expected: str
    mend: str


@dataclass(frozen=True)
class Subject:
    """What is looked at. `receipt` is empty for a model that no engine was built for."""

    folder: Path
    version: int
    config: Any
    target: Target
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    receipt: dict[str, Any]

    def finding(self, field: str, found: object, expected: object, mend: str, level: str = "error") -> Finding:
        return Finding(level, f"{self.folder.name}/{CONFIG}", field, str(found), str(expected), mend)


def lint(folder: Path, version: int, target: Target) -> tuple[Finding, ...]:
    """What is wrong with `folder`/config.pbtxt and `folder`/<version>/. Nothing of it is run."""
    try:
        config = triton_config.read(folder / CONFIG)
        inputs, outputs = _tensors(folder / str(version), config)
    except (UsageError, ModelFileError) as error:
        return (Finding("error", f"{folder.name}", "files", str(error), "a model that can be read", "deploy it again"),)
    described = folder / str(version) / DEPLOYMENT
    receipt = json.loads(described.read_bytes())["engine"] if described.exists() else {}
    subject = Subject(folder, version, config, target, inputs, outputs, receipt)
    return tuple(finding for check in CHECKS for finding in check(subject))


def _tensors(version: Path, config: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Of the engine itself: an ONNX file's own, a plan's as its build recorded them."""
    file = version / MODEL_FILES.get(config.backend, "")
    if config.backend not in MODEL_FILES or not file.is_file() or not file.stat().st_size:
        raise UsageError(f"backend {config.backend!r}", f"no model file {file.name} in version {version.name}",
                         f"one of {', '.join(MODEL_FILES.values())}")
    if file.suffix == ".onnx":
        source = model_file.read(file)
        return source.inputs, source.outputs
    if not (version / DEPLOYMENT).exists():
        raise UsageError(f"plan {file.name}", f"no {DEPLOYMENT} beside it", "the record of its build")
    found = json.loads((version / DEPLOYMENT).read_bytes())
    inputs, outputs = (tuple(map(TensorSpec.of, found[kind])) for kind in ("inputs", "outputs"))
    return inputs, outputs


def _name(s: Subject) -> Iterator[Finding]:
    if s.config.name != s.folder.name:
        yield s.finding("name", s.config.name, s.folder.name, "name the model after its folder")
    versions = s.config.version_policy.specific.versions
    if versions and s.version not in versions:
        yield s.finding("version_policy", list(versions), f"version {s.version} among them",
                        "list the version, or it is never served", "warning")


def _interface(s: Subject) -> Iterator[Finding]:
    for kind, specs in (("input", s.inputs), ("output", s.outputs)):
        known = {spec.name: spec for spec in specs}
        named = {tensor.name: tensor for tensor in getattr(s.config, kind)}
        for name in sorted(set(named) - set(known)):
            yield s.finding(kind, f"{name!r}", f"one of {', '.join(known)}", "use a name of the engine")
        if kind == "input":
            for name in sorted(set(known) - set(named)):
                yield s.finding(kind, f"no {name!r}", "every input of the engine", f"add {name!r}")
        for name in sorted(set(known) & set(named)):
            yield from _tensor(s, f"{kind}[{name}]", named[name], known[name])


def _tensor(s: Subject, field: str, tensor: Any, spec: TensorSpec) -> Iterator[Finding]:
    if triton_config.numpy_type(tensor.data_type) != spec.dtype:
        yield s.finding(f"{field}.data_type", model_config_pb2.DataType.Name(tensor.data_type),
                        triton_config.TYPES[spec.dtype.name], "use the engine's type")
    batched = s.config.max_batch_size > 0
    shape = [-1 if n is None else n for n in spec.shape]
    dims, wanted = list(tensor.dims), shape[1:] if batched else shape
    if batched and dims == shape:
        yield s.finding(f"{field}.dims", dims, wanted, "leave the batch out: max_batch_size stands for it")
    elif dims != wanted:
        yield s.finding(f"{field}.dims", dims, wanted, "use the engine's shape")
    if batched and spec.shape and spec.shape[0] is not None:
        yield s.finding("max_batch_size", s.config.max_batch_size, "0 for an engine with a fixed batch",
                        "set it to 0 and give dims with the batch")


def _batches(s: Subject) -> Iterator[Finding]:
    largest, batching = s.config.max_batch_size, s.config.dynamic_batching
    if not s.config.HasField("dynamic_batching"):
        return
    if not largest:
        yield s.finding("dynamic_batching", "there", "none with max_batch_size 0", "remove it")
    for size in batching.preferred_batch_size:
        if not 1 <= size <= largest:
            yield s.finding("dynamic_batching.preferred_batch_size", size, f"1 to {largest}", "choose a size of these")
    if batching.HasField("default_queue_policy"):
        yield s.finding("dynamic_batching.default_queue_policy", "one", "none: Triton 2.51 leaves requests waiting in "
                        "an idle server, https://github.com/triton-inference-server/server/issues/8870",
                        "bound the requests in flight in front of the server", "warning")
    warm = {request.batch_size for request in s.config.model_warmup}
    for size in sorted(set(batching.preferred_batch_size) - warm):
        yield s.finding("model_warmup", f"none for batch {size}", "one for each preferred batch",
                        "add it, or the first request of this size is slow", "warning")


def _profiles(s: Subject) -> Iterator[Finding]:
    profiles = s.receipt.get("key", {}).get("profiles", [])
    if s.config.backend != "tensorrt" or not profiles:
        return
    top, least = max(p["max"] for p in profiles), min(p["min"] for p in profiles)
    if s.config.max_batch_size > top:
        yield s.finding("max_batch_size", s.config.max_batch_size, f"at most {top}, the plan's largest profile",
                        "lower it, or build with a wider --profile")
    if least > 1 and s.config.max_batch_size:
        yield s.finding("max_batch_size", "the plan's smallest batch is " + str(least), "1",
                        "build with a --profile that begins with 1")


def _instances(s: Subject) -> Iterator[Finding]:
    plan = s.config.backend == "tensorrt"
    for group in s.config.instance_group:
        on_gpu = group.kind == GPU_KIND
        if on_gpu and not s.target.gpu:
            yield s.finding("instance_group.kind", "KIND_GPU", "KIND_CPU on a server without a GPU", "change the kind")
        if plan and not on_gpu:
            yield s.finding("instance_group.kind", "not KIND_GPU", "KIND_GPU for a plan", "change the kind")
        if group.count < 1:
            yield s.finding("instance_group.count", group.count, "1 and more", "raise it")
        if not on_gpu and s.config.optimization.execution_accelerators.gpu_execution_accelerator:
            yield s.finding("optimization.execution_accelerators", "one for a GPU", "none with KIND_CPU", "remove it",
                            "warning")


def _plan(s: Subject) -> Iterator[Finding]:
    key = s.receipt.get("key", {})
    if s.config.backend != "tensorrt" or not key:
        return
    size, memory = s.receipt["size_bytes"], s.target.gpu_memory_bytes
    if memory is not None and size > memory:
        yield s.finding("plan", f"{size >> 20} MiB", f"at most the GPU's {memory >> 20} MiB", "a smaller precision")
    built, here = key.get("compute_capability"), s.target.compute_capability
    if built and here and built != here and not key["options"]["hardware_compatible"]:
        yield s.finding("plan", f"built for compute capability {built}", here, "build it on the server's kind of GPU")
    if key["runtime"] == "tensorrt-rtx":
        yield s.finding("backend", "a TensorRT-RTX plan", "a TensorRT plan, which is what Triton's tensorrt backend "
                        "was built for", "serve it by a backend that was built against TensorRT-RTX, or build with "
                        "--runtime tensorrt", "warning")
    else:
        yield from _tensorrt(s, key["version"], key["options"]["version_compatible"])


def _tensorrt(s: Subject, version: str, compatible: bool) -> Iterator[Finding]:
    """A plan loads only in the TensorRT that built it: the one of the server's release has to be the same, or a later
    one for a plan that is version compatible."""
    if compatible:
        yield s.finding("plan", "version compatible: it carries code of its own", "a server that was started with "
                        "--backend-config=tensorrt,version-compatible=true", "start it so, if you trust the plan",
                        "warning")
    known = triton_releases.for_tensorrt(version)
    if s.target.release is None:
        has = " or ".join(row.container for row in known) or f"one with it, by {triton_releases.SUPPORT_MATRIX}"
        yield s.finding("plan", f"built by TensorRT {version}, for an unnamed Triton release", f"Triton {has}",
                        "name the server's by --triton-release", "warning")
        return
    row = triton_releases.find(s.target.release)
    if row is None:
        yield s.finding("plan", f"built by TensorRT {version}", f"that of Triton {s.target.release}, which the "
                        "table does not have", f"compare it with {triton_releases.SUPPORT_MATRIX}", "warning")
        return
    later = triton_releases.patch_version(version) < triton_releases.patch_version(row.tensorrt)
    if row not in known and not (compatible and later):
        yield s.finding("plan", f"built by TensorRT {version}", f"{row.tensorrt}, that of Triton {row.container}",
                        f"build with TensorRT {row.tensorrt}{', or with --version-compatible' if later else ''}")
    built = s.receipt["key"].get("compute_capability")
    if built and row.compute_capability and _pair(built) < _pair(row.compute_capability):
        yield s.finding("plan", f"built for compute capability {built}", f"at least {row.compute_capability}, the "
                        f"least of Triton {row.container}", "serve it by an earlier release")


def _pair(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _portable(s: Subject) -> Iterator[Finding]:
    path = s.folder / str(s.version) / "model.onnx"
    if not path.exists():
        return
    import onnx

    domains = {node.domain for node in onnx.load(path, load_external_data=False).graph.node}
    if "com.microsoft.nchwc" in domains:
        yield s.finding("model.onnx", "nodes of com.microsoft.nchwc, optimized for one machine", "a portable model",
                        "deploy the model that it was optimized from")


def _labels(s: Subject) -> Iterator[Finding]:
    for output in s.config.output:
        path = s.folder / output.label_filename
        if not output.label_filename:
            continue
        lines = len(path.read_text("utf-8", "replace").splitlines()) if path.is_file() else None
        if lines is None or (output.dims and lines != output.dims[-1]):
            yield s.finding(f"output[{output.name}].label_filename", "no such file" if lines is None else
                            f"{lines} lines", f"{output.dims[-1] if output.dims else 1} lines",
                            "give a line for each class")


CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    _name, _interface, _batches, _profiles, _instances, _plan, _portable, _labels)
