"""ONNX Runtime: the engine is the model as ONNX Runtime optimized it for this machine, so loading it optimizes nothing.

CPU and CUDA execution providers. One that was asked for and is not what runs is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from engines.errors import BuildError, RuntimeUnavailable
from engines.machine import cpu_name
from engines.runtime import BuildRequest, Built, Closing, Feeds, HostBuffers, Identity, TensorSpec, check_feeds, missing

try:
    import onnxruntime
except ImportError as error:
    raise missing("onnxruntime", "cpu") from error

SUFFIX = ".onnx"
# which form of the model a precision takes; ONNX Runtime's CPU has no bf16 convolution, and no TF32
VARIANTS: Mapping[str, str] = MappingProxyType({"fp32": "", "fp16": "fp16", "int8": "int8"})
GPU_VARIANTS: Mapping[str, str] = MappingProxyType({**VARIANTS, "tf32": "", "bf16": "bf16"})
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
        return Identity(request.runtime, onnxruntime.__version__, cpu_name())
    from engines.machine import gpu
    _providers(request)
    return Identity(request.runtime, onnxruntime.__version__, *gpu(request.device))


def variant(precision: str, device: str) -> str | None:
    return (VARIANTS if device == "cpu" else GPU_VARIANTS).get(precision)


def build(request: BuildRequest, target: Path, progress: Callable[[str], None]) -> Built:
    """Writes the optimized model to `target`. Raises BuildError."""
    options = _session_options(request)
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    _session(request, request.model, options)
    return Built(compute_precisions(onnx.load(target)), "ONNX Runtime's optimized graph")


def load(request: BuildRequest, path: Path) -> OrtRuntime:
    options = _session_options(request)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OrtRuntime(_session(request, path, options))


def _session_options(request: BuildRequest) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request.options.threads
    options.log_severity_level = 4  # what goes wrong is raised; warnings would print over the progress bar
    return options


def _providers(request: BuildRequest) -> list[Any]:
    if request.device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeUnavailable(f"device {request.device}", "this onnxruntime has no CUDA provider", "onnxruntime-gpu",
                                 "pip install 'enginesmith[gpu]', or give --device cpu")
    settings = {"device_id": request.device.removeprefix("cuda:"), "use_tf32": str(int(request.precision == "tf32"))}
    return [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]


def _session(request: BuildRequest, path: Path, options: Any) -> Any:
    providers = _providers(request)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime raises a C++ exception type for each status code
        reason = str(error).split("\n")[0][:300]
        raise BuildError(f"ONNX Runtime, {path.name}", reason, "a model it can load") from error
    session.disable_fallback()
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != first:
        raise RuntimeUnavailable(f"provider {first}", f"ONNX Runtime fell back to {session.get_providers()[0]}", "",
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

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(_spec(v) for v in session.get_inputs())
        self.outputs = tuple(_spec(v) for v in session.get_outputs())

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, check_feeds(self.inputs, feeds)), strict=True))

    def prepare(self, feeds: Feeds) -> OrtPrepared:
        return OrtPrepared(self._session, check_feeds(self.inputs, feeds), self.run(feeds))

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


def _spec(value: Any) -> TensorSpec:
    return TensorSpec(value.name, np.dtype(DTYPES[value.type]),
                      tuple(n if isinstance(n, int) else None for n in value.shape))
