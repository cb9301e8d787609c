"""OpenVINO on the CPU: the engine is the compiled model as OpenVINO exports it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engines.errors import BuildError, RuntimeUnavailable, StaleEngine
from engines.machine import cpu_name
from engines.runtime import BuildRequest, Built, Closing, Feeds, HostBuffers, Identity, TensorSpec, check_feeds, missing

try:
    import openvino
except ImportError as error:
    raise missing("openvino", "openvino") from error

SUFFIX = ".blob"
# int8 comes from QuantizeLinear/DequantizeLinear in the file; what is not quantized then runs in float32
HINTS: Mapping[str, str] = MappingProxyType({"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"})
COMPUTE = frozenset(("Convolution", "Deconvolution", "FullyConnected", "MatMul", "LSTMSequence", "GRUSequence"))
PRECISION = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}


def identity(request: BuildRequest) -> Identity:
    if request.device != "cpu":
        raise RuntimeUnavailable(f"openvino on {request.device}", "runs on the CPU here", "--device cpu")
    return Identity(request.runtime, openvino.__version__.split("-")[0], cpu_name())


def variant(precision: str, device: str) -> str | None:
    """OpenVINO rounds weights to fp16 and bf16 itself."""
    return None if precision not in HINTS else "int8" if precision == "int8" else ""


def build(request: BuildRequest, target: Path, progress: Callable[[str], None]) -> Built:
    """Compiles the model and writes it to `target`. Raises BuildError."""
    core = openvino.Core()
    try:
        model = core.read_model(str(request.model))
        _name_outputs(model)
        compiled = core.compile_model(model, "CPU", _settings(request))
    except RuntimeError as error:
        raise BuildError(f"OpenVINO, {request.model.name}", _reason(error), "a model it can compile") from error
    target.write_bytes(compiled.export_model().getvalue())
    return Built(compute_precisions(compiled), "OpenVINO's runtime model")


def load(request: BuildRequest, path: Path) -> OpenVinoRuntime:
    try:
        return OpenVinoRuntime(openvino.Core().import_model(path.read_bytes(), "CPU", _settings(request)))
    except RuntimeError as error:
        raise StaleEngine(f"engine {path}", f"OpenVINO does not load it ({_reason(error)})", "",
                          "build it again with --force") from error


def _name_outputs(model: Any) -> None:
    """A tensor that ONNX knows by two names (behind a Dropout) keeps the one that the output has."""
    for port in model.outputs:
        name = port.get_node().get_friendly_name().split("/sink_port_")[0]
        if name in port.get_names():
            port.get_tensor().set_names({name})


def _settings(request: BuildRequest) -> dict[str, Any]:
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[request.precision], "PERFORMANCE_HINT": "LATENCY"}
    return settings | ({"INFERENCE_NUM_THREADS": request.options.threads} if request.options.threads else {})


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def compute_precisions(compiled: Any) -> dict[str, int]:
    """Compute layers by the precision that the runtime model gives them."""
    counted: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) in COMPUTE:
            precision = info["runtimePrecision"].astype(str)
            counted[PRECISION.get(precision, precision)] += 1
    return dict(counted)


class OpenVinoRuntime(Closing):
    """A compiled model with one infer request."""

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self.inputs = tuple(_spec(port) for port in compiled.inputs)
        self.outputs = tuple(_spec(port) for port in compiled.outputs)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        found = self._request.infer(check_feeds(self.inputs, feeds))
        return {spec.name: np.array(found[i]) for i, spec in enumerate(self.outputs)}

    def prepare(self, feeds: Feeds) -> OpenVinoPrepared:
        return OpenVinoPrepared(self._compiled, check_feeds(self.inputs, feeds), self.run(feeds))

    def close(self) -> None:
        self._request = self._compiled = None


class OpenVinoPrepared(HostBuffers):
    """The request reads and writes host memory of ours."""

    def __init__(self, compiled: Any, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        super().__init__(inputs, outputs)
        self._request = compiled.create_infer_request()
        for name, array in self.inputs.items():
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        for name, array in self.outputs.items():
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def __call__(self) -> None:
        self._request.infer()


def _spec(port: Any) -> TensorSpec:
    shape = tuple(None if d.is_dynamic else int(d.get_length()) for d in port.partial_shape)
    return TensorSpec(port.any_name, np.dtype(port.element_type.to_dtype()), shape)
