"""ONNX Runtime: the engine is the model as ONNX Runtime optimized it for this machine, so loading it optimizes nothing.

    onnxruntime                  the CPU or the CUDA provider, by device; the engine is the optimized graph
    onnxruntime-tensorrt         the TensorRT provider; the engine is an ONNX file with the plan inside (EPContext)
    onnxruntime-tensorrt-rtx     the same by the plugin package onnxruntime-ep-nv-tensorrt-rtx

A provider that was asked for and is not what runs is an error, for the whole session and for each compute layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from engines.errors import BuildError, PrecisionError, RuntimeUnavailable
from engines.machine import cpu_name
from engines.runtime import (
    BuildRequest,
    Built,
    Closing,
    Feeds,
    HostBuffers,
    Identity,
    TensorSpec,
    check_feeds,
    missing,
    profile_shapes,
)

try:
    import onnxruntime
except ImportError as error:
    raise missing("onnxruntime", "cpu") from error

SUFFIX = ".onnx"
# which form of the model a precision takes; ONNX Runtime's CPU has no bf16 convolution, and no TF32
VARIANTS: Mapping[str, str] = MappingProxyType({"fp32": "", "fp16": "fp16", "int8": "int8"})
GPU_VARIANTS: Mapping[str, str] = MappingProxyType(
    {"fp32": "", "tf32": "", "fp16": "fp16", "bf16": "bf16", "int8": "int8-symmetric"})
PROVIDERS: Mapping[str, str] = MappingProxyType({
    "onnxruntime": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider"})
CONTEXT_PROVIDERS: Mapping[str, str] = MappingProxyType(  # what their options begin with
    {"onnxruntime-tensorrt": "trt", "onnxruntime-tensorrt-rtx": "nv"})
LEVELS: Mapping[str, str] = MappingProxyType({
    "all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC", "none": "ORT_DISABLE_ALL"})
COMPUTE = frozenset(("Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU",
                     "RNN"))
INTEGER = frozenset(("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
                     "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"))
PRECISION = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16",
             onnx.TensorProto.DOUBLE: "fp64", onnx.TensorProto.INT8: "int8", onnx.TensorProto.UINT8: "int8"}
DTYPES: Mapping[str, type] = MappingProxyType({
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(uint16)": np.uint16, "tensor(int16)": np.int16,
    "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(uint32)": np.uint32, "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
})


def identity(request: BuildRequest) -> Identity:
    if request.device == "cpu":
        if request.runtime != "onnxruntime":
            raise RuntimeUnavailable(f"{request.runtime} on cpu", "runs on a GPU only", "--device cuda:0",
                                     "use onnxruntime on the CPU")
        return Identity(request.runtime, onnxruntime.__version__, cpu_name())
    from engines.machine import gpu
    _require(request)
    return Identity(request.runtime, _version(request), *gpu(request.device))


def variant(precision: str, device: str) -> str | None:
    return (VARIANTS if device == "cpu" else GPU_VARIANTS).get(precision)


def build(request: BuildRequest, target: Path, progress: Callable[[str], None]) -> Built:
    """Writes the optimized model to `target`. Raises BuildError."""
    options = _session_options(request)
    if request.runtime in CONTEXT_PROVIDERS:
        return _build_context(request, target, options)
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[request.options.graph])
    _session(request, request.model, options)
    return Built(compute_precisions(onnx.load(target)), "ONNX Runtime's optimized graph")


def _build_context(request: BuildRequest, target: Path, options: Any) -> Built:
    """The plan inside of an ONNX file. Raises PrecisionError for compute layers that the provider left to another."""
    for name, value in (("enable", "1"), ("file_path", str(target)), ("embed_mode", "1")):
        options.add_session_config_entry(f"ep.context_{name}", value)
    _session(request, request.model, options)
    left = sum(compute_precisions(onnx.load(target)).values())
    if left:
        raise PrecisionError(f"{request.runtime}, {request.model.name}", f"{left} compute layers fell back to CUDA "
                             "or the CPU", "all of them in TensorRT", "use --runtime tensorrt, which says why")
    return Built(compute_precisions(onnx.load(request.model)), "the strongly typed model that was built")


def load(request: BuildRequest, path: Path) -> OrtRuntime:
    options = _session_options(request)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OrtRuntime(_session(request, path, options), request.device)


def _session_options(request: BuildRequest) -> Any:
    if request.options.graph not in LEVELS:
        raise BuildError(f"graph optimization {request.options.graph!r}", "unknown", f"one of {', '.join(LEVELS)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request.options.threads
    options.log_severity_level = 4  # what goes wrong is raised; warnings would print over the progress bar
    return options


def _require(request: BuildRequest) -> None:
    """Raises RuntimeUnavailable where this onnxruntime lacks the provider."""
    name = PROVIDERS[request.runtime]
    if request.runtime == "onnxruntime-tensorrt-rtx":
        _register(name)
    elif name not in onnxruntime.get_available_providers():
        raise RuntimeUnavailable(f"{request.runtime} on {request.device}", f"this onnxruntime has no {name}",
                                 "onnxruntime-gpu", "pip install 'enginesmith[gpu]', or give --device cpu")


def _plugin() -> Any:
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as error:
        raise missing("onnxruntime-ep-nv-tensorrt-rtx", "rtx-plugin") from error
    return plugin


def _register(name: str) -> None:
    if any(device.ep_name == name for device in onnxruntime.get_ep_devices()):
        return
    try:
        onnxruntime.register_execution_provider_library(name, _plugin().get_library_path())
    except Exception as error:  # a C++ exception type for each status code
        raise RuntimeUnavailable(f"provider {name}", str(error).split("error: ")[-1][:200], "an NVIDIA driver",
                                 "see nvidia-smi") from error


def _version(request: BuildRequest) -> str:
    plugin = f" with plugin {_plugin().__version__}" if request.runtime == "onnxruntime-tensorrt-rtx" else ""
    return f"{onnxruntime.__version__}{plugin}"


def _settings(request: BuildRequest) -> dict[str, str]:
    """Options of the provider, in the words of each."""
    index = request.device.removeprefix("cuda:")
    if request.runtime == "onnxruntime":
        return {"device_id": index, "use_tf32": str(int(request.precision == "tf32"))}
    prefix = CONTEXT_PROVIDERS[request.runtime]
    found = {"device_id": index} if prefix == "trt" else {}
    for bound, shapes in profile_shapes(request.profiles, _input_shapes(request.model)).items():
        found[f"{prefix}_profile_{bound}_shapes"] = shapes
    if request.options.workspace_bytes is not None:
        found[f"{prefix}_max_workspace_size"] = str(request.options.workspace_bytes)
    return found


def _input_shapes(model: Path) -> dict[str, tuple[int | None, ...]]:
    graph = onnx.load(model, load_external_data=False).graph
    return {v.name: tuple(d.dim_value or None for d in v.type.tensor_type.shape.dim) for v in graph.input}


def _session(request: BuildRequest, path: Path, options: Any) -> Any:
    name = "CPUExecutionProvider" if request.device == "cpu" else PROVIDERS[request.runtime]
    providers: list[Any] = [name]
    if request.device != "cpu":
        _require(request)
        providers = [(name, _settings(request)), *(["CUDAExecutionProvider"] if name.startswith("Tensorrt") else []),
                     "CPUExecutionProvider"]
    if request.runtime == "onnxruntime-tensorrt-rtx":
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
        options.add_provider_for_devices([devices[int(request.device.removeprefix("cuda:"))]], _settings(request))
        providers = []
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers or None)
    except Exception as error:  # onnxruntime raises a C++ exception type for each status code
        reason = str(error).split("\n")[0][:300]
        raise BuildError(f"ONNX Runtime, {path.name}", reason, "a model it can load") from error
    session.disable_fallback()
    if session.get_providers()[0] != name:
        raise RuntimeUnavailable(f"provider {name}", f"ONNX Runtime fell back to {session.get_providers()[0]}", "",
                                 "see its log for the library that it misses")
    return session


def compute_precisions(model: onnx.ModelProto) -> dict[str, int]:
    """Compute layers by the type of the arithmetic they do, read from the types of their weights or operands."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.value_info)}
    counted: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type == "Cast":
            types[node.output[0]] = next(a.i for a in node.attribute if a.name == "to")
        elif node.op_type == "DequantizeLinear":
            types[node.output[0]] = types.get(node.input[1], onnx.TensorProto.FLOAT)
        if node.op_type in INTEGER:
            counted["int8"] += 1
        elif node.op_type in COMPUTE:
            counted[PRECISION.get(types.get(node.input[1], onnx.TensorProto.FLOAT), "fp32")] += 1
    return dict(counted)


class OrtRuntime(Closing):
    """A session that takes and gives host arrays."""

    def __init__(self, session: Any, device: str) -> None:
        self._session, self._device = session, device
        self.inputs = tuple(_spec(v) for v in session.get_inputs())
        self.outputs = tuple(_spec(v) for v in session.get_outputs())

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, check_feeds(self.inputs, feeds)), strict=True))

    def prepare(self, feeds: Feeds) -> OrtPrepared | OrtGpuPrepared:
        arguments = self._session, check_feeds(self.inputs, feeds), self.run(feeds)
        return OrtPrepared(*arguments) if self._device == "cpu" else OrtGpuPrepared(*arguments, self._device)

    def close(self) -> None:
        self._session = None


class OrtPrepared(HostBuffers):
    """I/O binding: the session reads and writes the same host memory in every call."""

    def __init__(self, session: Any, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        super().__init__(inputs, outputs)
        self._session, self._binding = session, session.io_binding()
        for name, array in self.inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in self.outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)


class OrtGpuPrepared(HostBuffers):
    """I/O binding to memory of the GPU, taken once; a call copies in, runs, and copies out."""

    def __init__(self, session: Any, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray],
                 device: str) -> None:
        super().__init__(inputs, outputs)
        self._session, self._binding = session, session.io_binding()
        index = int(device.removeprefix("cuda:"))
        self._fed = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a, "cuda", index) for n, a in self.inputs.items()}
        self._read = {n: onnxruntime.OrtValue.ortvalue_from_shape_and_type(a.shape, a.dtype, "cuda", index)
                      for n, a in self.outputs.items()}
        for name, value in self._fed.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._read.items():
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self) -> None:
        for name, value in self._fed.items():
            value.update_inplace(self.inputs[name])
        self._session.run_with_iobinding(self._binding)
        for name, value in self._read.items():
            np.copyto(self.outputs[name], value.numpy())


def _spec(value: Any) -> TensorSpec:
    return TensorSpec(value.name, np.dtype(DTYPES[value.type]),
                      tuple(n if isinstance(n, int) else None for n in value.shape))
