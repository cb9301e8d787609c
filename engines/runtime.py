"""One protocol for every runtime: what goes in, what comes out, and two ways to run.

A backend is a module with a SUFFIX for its files and four functions. RUNTIMES names them all, and nothing is imported
before it is asked for:

    identity(request) -> Identity                          which runtime on which device; raises RuntimeUnavailable
    variant(precision, device) -> str | None               the form of the model it takes; "": float32, None: none
    build(request, target, progress) -> Built              writes the engine file
    load(request, path) -> Runtime                         a context manager that frees what it took
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, Self, cast, runtime_checkable

import numpy as np

from engines.errors import BuildError, FeedError, RuntimeUnavailable

Feeds = Mapping[str, np.ndarray]
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
RUNTIMES: Mapping[str, str] = MappingProxyType({
    "onnxruntime": "engines.ort", "onnxruntime-tensorrt": "engines.ort", "onnxruntime-tensorrt-rtx": "engines.ort",
    "openvino": "engines.openvino", "tensorrt": "engines.trt", "tensorrt-rtx": "engines.trt",
    "tensorflow": "engines.tf", "tensorflow-xla": "engines.tf",
})


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of an input or output; None is a size that is open."""

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]

    def described(self) -> dict[str, Any]:
        """As manifests and receipts have it, JSON-ready."""
        return {"name": self.name, "dtype": self.dtype.name, "shape": ["batch" if n is None else n for n in self.shape]}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["name"], np.dtype(described["dtype"]),
                   tuple(n if isinstance(n, int) else None for n in described["shape"]))


@dataclass(frozen=True)
class Profile:
    """Batch sizes that an engine takes (min to max) and is tuned for (opt). Raises BuildError if out of order."""

    min: int = 1
    opt: int = 1
    max: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise BuildError(f"profile {self.min},{self.opt},{self.max}", "not in order", "1 <= min <= opt <= max")


@dataclass(frozen=True)
class Options:
    """What changes an engine beside its precision. A runtime reads the ones it knows; all are in the receipt.

    `threads` 0: as many as physical cores. `graph`: ONNX Runtime's graph optimizations, all, extended, basic or none.
    `optimization_level`: TensorRT 0 to 5 (None: its default). `workspace_bytes` None: no limit.
    `compute_capabilities`: TensorRT-RTX targets, e.g. ("86", "120"); empty: every one it knows, or the GPU at hand.
    """

    threads: int = 0
    graph: str = "all"
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class BuildRequest:
    """One engine: `model` is the ONNX file in the precision's form, `device` is `cpu` or `cuda:N`."""

    model: Path
    runtime: str
    precision: str = "fp32"
    device: str = "cpu"
    profiles: tuple[Profile, ...] = (Profile(),)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Identity:
    """What an engine is bound to."""

    runtime: str
    version: str
    device: str
    compute_capability: str = ""
    driver: str = ""


@dataclass(frozen=True)
class Built:
    """What a build says of its engine. `layers`: precision -> number of compute layers, read from the engine itself;
    `source` says from where."""

    layers: Mapping[str, int]
    source: str
    tf32: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def profile_shapes(profiles: tuple[Profile, ...], shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, str]:
    """`min`, `opt` and `max` -> `name:1x224x224x3,...` of the inputs whose batch is open (None), as ONNX Runtime's
    TensorRT providers take them; empty if none is."""
    fed = {name: shape for name, shape in shapes.items() if None in shape}
    batches = {"min": min(p.min for p in profiles), "opt": profiles[0].opt, "max": max(p.max for p in profiles)}
    return {bound: ",".join(f"{name}:" + "x".join(str(n or batch) for n in shape) for name, shape in fed.items())
            for bound, batch in batches.items() if fed}


class Prepared(Protocol):
    """The same shapes again and again, without an allocation: write into `inputs`, call, read `outputs`."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def __call__(self) -> None: ...


class Runtime(Protocol):
    """An engine that is loaded and can run."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """New arrays by output name. Raises FeedError for what the engine does not take."""

    def prepare(self, feeds: Feeds) -> Prepared:
        """Buffers for the shapes of `feeds`, holding `feeds`. Raises FeedError."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None: ...


@runtime_checkable
class Differentiable(Protocol):
    """A runtime that has gradients too."""

    def prepare_backward(self, feeds: Feeds) -> Prepared:
        """A run that ends with the gradient of the L2 loss of all outputs by every trainable parameter."""


class Closing:
    """A runtime as a context manager."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


class HostBuffers:
    """The arrays of a prepared run in host memory of ours: `inputs` filled, `outputs` of the shapes given."""

    def __init__(self, inputs: Feeds, outputs: Feeds) -> None:
        self.inputs = {name: array.copy() for name, array in inputs.items()}
        self.outputs = {name: np.empty_like(array) for name, array in outputs.items()}


class Backend(Protocol):
    """What a backend module holds."""

    SUFFIX: str

    def identity(self, request: BuildRequest) -> Identity: ...

    def variant(self, precision: str, device: str) -> str | None: ...

    def build(self, request: BuildRequest, target: Path, progress: Callable[[str], None]) -> Built: ...

    def load(self, request: BuildRequest, path: Path) -> Runtime: ...


def backend(runtime: str) -> Backend:
    """The backend's module. Raises BuildError for an unknown runtime, RuntimeUnavailable where it is not installed."""
    if runtime not in RUNTIMES:
        raise BuildError(f"runtime {runtime!r}", "unknown", f"one of {', '.join(RUNTIMES)}")
    return cast(Backend, importlib.import_module(RUNTIMES[runtime]))


def missing(package: str, extra: str) -> RuntimeUnavailable:
    """For a backend whose package cannot be imported."""
    return RuntimeUnavailable(f"package {package}", "not installed", "", f"pip install 'enginesmith[{extra}]'")


def check_feeds(inputs: tuple[TensorSpec, ...], feeds: Feeds, profiles: tuple[Profile, ...] = ()
                ) -> dict[str, np.ndarray]:
    """Contiguous arrays for exactly `inputs`. Raises FeedError that names the first input that is wrong.

    Sizes that are open must agree with `profiles` in the first dimension, if there are any.
    """
    names = [spec.name for spec in inputs]
    if set(names) != set(feeds):
        raise FeedError("feeds", ", ".join(sorted(feeds)) or "none", ", ".join(names))
    batches = {len(feeds[s.name]) for s in inputs if s.shape and s.shape[0] is None and np.ndim(feeds[s.name])}
    for spec in inputs:
        array = feeds[spec.name]
        subject, wanted = f"feed {spec.name}", "x".join("N" if n is None else str(n) for n in spec.shape)
        if array.dtype != spec.dtype:
            raise FeedError(subject, f"type {array.dtype}", str(spec.dtype), f"convert it by .astype('{spec.dtype}')")
        if array.ndim != len(spec.shape) or any(n not in (None, m) for n, m in zip(spec.shape, array.shape,
                                                                                  strict=True)):
            raise FeedError(subject, f"shape {'x'.join(map(str, array.shape)) or 'of a scalar'}", wanted)
        if not array.size:
            raise FeedError(subject, "no elements", wanted)
    if len(batches) > 1:
        raise FeedError("feeds", f"batch sizes {', '.join(map(str, sorted(batches)))}", "the same for every input")
    if batches and profiles and not any(p.min <= min(batches) <= p.max for p in profiles):
        raise FeedError("feeds", f"batch {min(batches)}", " or ".join(f"{p.min} to {p.max}" for p in profiles),
                        "build the engine with a wider --profile")
    return {name: np.ascontiguousarray(feeds[name]) for name in names}


def fields(value: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready dict: tuples become lists."""
    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: plain(v) for key, v in item.items()}
        return [plain(v) for v in item] if isinstance(item, (tuple, list)) else item
    return cast(dict[str, Any], plain(asdict(value)))
