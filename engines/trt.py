"""TensorRT and TensorRT-RTX: engines that run on a GPU, through cuda-python.

Buffers on the device and pinned host buffers are made once for a shape; a prepared run is one CUDA graph (TensorRT) or
one enqueue (TensorRT-RTX, whose own graphs are switched on), timed by CUDA events in its three parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engines.errors import EngineError, RuntimeUnavailable, StaleEngine
from engines.machine import gpu
from engines.runtime import BuildRequest, Closing, Feeds, Identity, Profile, TensorSpec, check_feeds, missing
from engines.trt_build import build, module

__all__ = ["SUFFIX", "build", "identity", "load", "variant"]
SUFFIX = ".plan"
AHEAD = "built ahead of time"
VARIANTS: Mapping[str, str] = MappingProxyType(
    {"fp32": "", "tf32": "", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8", "int8": "int8-symmetric"})


def identity(request: BuildRequest) -> Identity:
    trt = module(request.runtime)
    if request.device == "cpu":
        if request.runtime == "tensorrt":
            raise RuntimeUnavailable("tensorrt on cpu", "builds and runs on a GPU only", "--device cuda:0",
                                     "use tensorrt-rtx to build ahead of time")
        return Identity(request.runtime, trt.__version__, AHEAD, ",".join(request.options.compute_capabilities))
    return Identity(request.runtime, trt.__version__, *gpu(request.device))


def variant(precision: str, device: str) -> str | None:
    return VARIANTS.get(precision)


def load(request: BuildRequest, path: Path) -> TrtRuntime:
    if request.device == "cpu":
        raise RuntimeUnavailable(f"engine {path.name}", "needs a GPU to run", "--device cuda:0")
    identity(request)
    return TrtRuntime(request, path)


def _cuda() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise missing("cuda-python", "gpu") from error
    return runtime


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-python call. Raises EngineError for any status but success."""
    status, *values = result
    if int(status) != 0:
        raise EngineError("CUDA", f"{status.name}", "", "see the driver's log (dmesg, nvidia-smi)")
    return values[0] if len(values) == 1 else tuple(values)


def copy_seconds(device: str, size: int, tries: int) -> list[float]:
    """Of copies of `size` bytes within the memory of `cuda:N`, by CUDA events."""
    cuda = _cuda()
    _checked(cuda.cudaSetDevice(int(device.removeprefix("cuda:"))))
    source, target = _checked(cuda.cudaMalloc(size)), _checked(cuda.cudaMalloc(size))
    first, last = _checked(cuda.cudaEventCreate()), _checked(cuda.cudaEventCreate())
    found = []
    for _ in range(tries):
        _checked(cuda.cudaEventRecord(first, 0))
        _checked(cuda.cudaMemcpyAsync(target, source, size, cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, 0))
        _checked(cuda.cudaEventRecord(last, 0))
        _checked(cuda.cudaEventSynchronize(last))
        found.append(float(_checked(cuda.cudaEventElapsedTime(first, last))) / 1000)
    for memory in (source, target):
        _checked(cuda.cudaFree(memory))
    for event in (first, last):
        _checked(cuda.cudaEventDestroy(event))
    return found


class TrtRuntime(Closing):
    """A deserialized engine with one execution context for each optimization profile."""

    def __init__(self, request: BuildRequest, path: Path) -> None:
        trt, self._cuda = module(request.runtime), _cuda()
        self._rtx = request.runtime == "tensorrt-rtx"
        _checked(self._cuda.cudaSetDevice(int(request.device.removeprefix("cuda:"))))
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise StaleEngine(f"engine {path}", f"{request.runtime} {trt.__version__} does not load it", "",
                              "build it again with --force")
        if request.options.strip_weights:
            self._refit(trt, request)
        self._stream = _checked(self._cuda.cudaStreamCreate())
        self._contexts: dict[int, Any] = {}
        self._prepared: dict[tuple[tuple[int, ...], ...], TrtPrepared] = {}
        self.profiles = request.profiles
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        fed = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._numpy = trt.nptype
        self.inputs = tuple(self._spec(n) for n in fed)
        self.outputs = tuple(self._spec(n) for n in names if n not in fed)

    def _refit(self, trt: Any, request: BuildRequest) -> None:
        """Gives a plan without weights those of the model it was built from."""
        refitter = trt.Refitter(self._engine, self._logger)
        parsed = trt.OnnxParserRefitter(refitter, self._logger).refit_from_file(str(request.model))
        if not parsed or not refitter.refit_cuda_engine():
            raise StaleEngine(f"engine of {request.model.name}", "does not take the model's weights",
                              "the model it was built from", "build it again")

    def _spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, np.dtype(self._numpy(self._engine.get_tensor_dtype(name))),
                          tuple(None if n == -1 else n for n in self._engine.get_tensor_shape(name)))

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        arrays = check_feeds(self.inputs, feeds, self.profiles)
        key = tuple(a.shape for a in arrays.values())
        if key not in self._prepared:
            self._prepared[key] = self._make(arrays)
        prepared = self._prepared[key]
        for name, array in arrays.items():
            prepared.inputs[name][...] = array
        prepared()
        return {name: array.copy() for name, array in prepared.outputs.items()}

    def prepare(self, feeds: Feeds) -> TrtPrepared:
        return self._make(check_feeds(self.inputs, feeds, self.profiles))

    def _make(self, arrays: Mapping[str, np.ndarray]) -> TrtPrepared:
        batch = next((len(arrays[s.name]) for s in self.inputs if s.shape and s.shape[0] is None), 1)
        index = next((i for i, p in enumerate(self.profiles) if _holds(p, batch)), 0)
        context = self._context()
        context.set_optimization_profile_async(index, self._stream)
        return TrtPrepared(self._cuda, context, self._stream, arrays, self.outputs, graph=not self._rtx)

    def _context(self) -> Any:
        if not self._rtx:
            return self._engine.create_execution_context()
        trt, config = module("tensorrt-rtx"), self._engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # kernels for a shape are compiled before its first run, not beside later ones
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self._engine.create_execution_context(config)

    def close(self) -> None:
        for prepared in self._prepared.values():
            prepared.close()
        self._prepared.clear()
        if self._stream is not None:
            _checked(self._cuda.cudaStreamDestroy(self._stream))
        self._stream = self._engine = self._runtime = None


def _holds(profile: Profile, batch: int) -> bool:
    return profile.min <= batch <= profile.max


class TrtPrepared:
    """Pinned host buffers and device buffers of one shape.

    `times_ms` holds the last run's (host to device, compute, device to host), by CUDA events.
    """

    def __init__(self, cuda: Any, context: Any, stream: Any, arrays: Mapping[str, np.ndarray],
                 outputs: tuple[TensorSpec, ...], graph: bool) -> None:
        self._cuda, self._context, self._stream, self._graph = cuda, context, stream, None
        self._host: list[Any] = []
        self._device: list[Any] = []
        self.times_ms = (0.0, 0.0, 0.0)
        for name, array in arrays.items():
            context.set_input_shape(name, array.shape)
        self.inputs = {name: self._bound(name, array.shape, array.dtype) for name, array in arrays.items()}
        self.outputs = {spec.name: self._bound(spec.name, tuple(context.get_tensor_shape(spec.name)), spec.dtype)
                        for spec in outputs}
        for name, array in arrays.items():
            self.inputs[name][...] = array
        self._events = [_checked(cuda.cudaEventCreate()) for _ in range(4)]
        self()  # lazy loading of kernels may not happen inside of a capture
        if graph:
            self._graph = self._captured()

    def _bound(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        import ctypes

        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        pinned, device = _checked(self._cuda.cudaMallocHost(size)), _checked(self._cuda.cudaMalloc(size))
        self._host.append(pinned)
        self._device.append((device, size))
        self._context.set_tensor_address(name, int(device))
        memory = (ctypes.c_byte * size).from_address(int(pinned))
        return np.frombuffer(memoryview(memory), dtype, int(np.prod(shape))).reshape(shape)

    def _captured(self) -> Any:
        cuda = self._cuda
        _checked(cuda.cudaStreamBeginCapture(self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        self._context.execute_async_v3(int(self._stream))
        graph = _checked(cuda.cudaStreamEndCapture(self._stream))
        return _checked(cuda.cudaGraphInstantiate(graph, 0))

    def __call__(self) -> None:
        cuda, count = self._cuda, len(self.inputs)
        kinds = cuda.cudaMemcpyKind
        self._mark(0)
        for (device, size), pinned in zip(self._device[:count], self._host[:count], strict=True):
            _checked(cuda.cudaMemcpyAsync(device, pinned, size, kinds.cudaMemcpyHostToDevice, self._stream))
        self._mark(1)
        if self._graph is None:
            if not self._context.execute_async_v3(int(self._stream)):
                raise EngineError("TensorRT", "the engine did not run", "", "see its log on stderr")
        else:
            _checked(cuda.cudaGraphLaunch(self._graph, self._stream))
        self._mark(2)
        for (device, size), pinned in zip(self._device[count:], self._host[count:], strict=True):
            _checked(cuda.cudaMemcpyAsync(pinned, device, size, kinds.cudaMemcpyDeviceToHost, self._stream))
        self._mark(3)
        _checked(cuda.cudaStreamSynchronize(self._stream))
        first, second, third = (float(_checked(cuda.cudaEventElapsedTime(self._events[i], self._events[i + 1])))
                                for i in range(3))
        self.times_ms = first, second, third

    def _mark(self, index: int) -> None:
        _checked(self._cuda.cudaEventRecord(self._events[index], self._stream))

    def close(self) -> None:
        for event in self._events:
            _checked(self._cuda.cudaEventDestroy(event))
        for pinned, (device, _) in zip(self._host, self._device, strict=True):
            _checked(self._cuda.cudaFreeHost(pinned))
            _checked(self._cuda.cudaFree(device))
        self.inputs, self.outputs = {}, {}
