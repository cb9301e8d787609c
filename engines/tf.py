"""TensorFlow, the baseline: the SavedModel beside the ONNX file, as a graph or compiled by XLA.

There is nothing to build, so the engine file only names the SavedModel's bytes; loading checks them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engines.digest import sha256
from engines.errors import BuildError, StaleEngine
from engines.machine import cpu_name, gpu
from engines.runtime import BuildRequest, Built, Closing, Feeds, HostBuffers, Identity, TensorSpec, check_feeds, missing


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """File descriptor 2 to nowhere: TensorFlow's C++ side logs its start before any setting applies."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


try:
    with _silent():
        import tensorflow
        tensorflow.zeros(())
except ImportError as error:
    raise missing("tensorflow", "cpu") from error

SUFFIX = ".savedmodel"
SAVED_MODEL = "saved_model"
COMPUTE = ("Conv2D", "Conv3D", "DepthwiseConv2dNative", "MatMul", "BatchMatMulV2", "_FusedConv2D")


def identity(request: BuildRequest) -> Identity:
    if request.device == "cpu":
        return Identity(request.runtime, tensorflow.__version__, cpu_name())
    return Identity(request.runtime, tensorflow.__version__, *gpu(request.device))


def variant(precision: str, device: str) -> str | None:
    return "" if precision == "fp32" or (precision == "tf32" and device != "cpu") else None


def build(request: BuildRequest, target: Path, progress: Callable[[str], None]) -> Built:
    folder = request.model.with_name(SAVED_MODEL)
    if not folder.is_dir():
        raise BuildError(f"{request.runtime} of {request.model.parent.name}", "no SavedModel in its artifact",
                         "one from the export", "export it with --saved-model")
    target.write_text(json.dumps({SAVED_MODEL: sha256(folder)}), "utf-8")
    function = _function(request)
    types = [op.outputs[0].dtype for op in _operations(function) if op.type in COMPUTE]
    tf32 = request.precision == "tf32"
    names = {tensorflow.float32: request.precision if tf32 else "fp32", tensorflow.float16: "fp16",
             tensorflow.bfloat16: "bf16"}
    layers = {names.get(kind, kind.name): types.count(kind) for kind in set(types)}
    return Built(layers, "TensorFlow's graph", tf32 if request.device != "cpu" else None)


def load(request: BuildRequest, path: Path) -> TfRuntime:
    try:
        known = json.loads(path.read_bytes())[SAVED_MODEL]
    except (ValueError, KeyError, TypeError) as error:
        raise StaleEngine(f"engine {path.name}", "not readable", "", "build it again") from error
    folder = request.model.with_name(SAVED_MODEL)
    if not folder.is_dir() or sha256(folder) != known:
        raise StaleEngine(f"engine {path.name}", "the SavedModel is another one, or gone", "", "build it again")
    return TfRuntime(request, _function(request))


def _function(request: BuildRequest) -> Any:
    for device in tensorflow.config.list_physical_devices("GPU"):
        tensorflow.config.experimental.set_memory_growth(device, True)
    tensorflow.config.experimental.enable_tensor_float_32_execution(request.precision == "tf32")
    loaded = tensorflow.saved_model.load(str(request.model.with_name(SAVED_MODEL)))
    signature = loaded.signatures["serving_default"]
    signature.keep = loaded  # the function does not keep its variables alive
    return signature


def _operations(function: Any) -> list[Any]:
    graphs = [function.graph]
    for graph in graphs:
        graphs += [getattr(f, "graph", None) or f for f in getattr(graph, "_functions", {}).values()
                   if hasattr(getattr(f, "graph", None), "get_operations")]
    return [op for graph in graphs for op in graph.get_operations()]


class TfRuntime(Closing):
    """A concrete function on the CPU or one GPU."""

    def __init__(self, request: BuildRequest, signature: Any) -> None:
        self._device = "/CPU:0" if request.device == "cpu" else f"/GPU:{request.device.removeprefix('cuda:')}"
        self._signature = signature
        self._call = signature
        self._xla = request.runtime == "tensorflow-xla"
        if self._xla:
            self._call = tensorflow.function(lambda **fed: signature(**fed), jit_compile=True, autograph=False)
        self.inputs = tuple(_spec(name, s) for name, s in signature.structured_input_signature[1].items())
        self.outputs = tuple(_spec(name, s) for name, s in signature.structured_outputs.items())

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in self._run(self._tensors(feeds)).items()}

    def prepare(self, feeds: Feeds) -> TfPrepared:
        return TfPrepared(self, check_feeds(self.inputs, feeds), self.run(feeds))

    def prepare_backward(self, feeds: Feeds) -> TfPrepared:
        """As the classic convnet benchmark times it: the gradient of the L2 loss by all parameters."""
        variables = [v for v in self._signature.keep.weights if v.trainable]

        def step(**fed: Any) -> dict[str, Any]:
            with tensorflow.GradientTape() as tape:
                tape.watch(variables)
                outputs = self._signature(**fed)
                loss = tensorflow.add_n([tensorflow.nn.l2_loss(value) for value in outputs.values()])
            gradients = [g for g in tape.gradient(loss, variables) if g is not None]
            with tensorflow.control_dependencies(gradients):  # the loss is told once every gradient is there
                told = {"loss": tensorflow.identity(loss)}
            return told | {f"gradient_{i}": g for i, g in enumerate(gradients)}  # else XLA would leave them out

        self._call = tensorflow.function(step, jit_compile=self._xla, autograph=False)
        return TfPrepared(self, check_feeds(self.inputs, feeds), {"loss": np.empty((), np.float32)})

    def _tensors(self, feeds: Feeds) -> dict[str, Any]:
        with tensorflow.device(self._device):
            return {name: tensorflow.constant(a) for name, a in check_feeds(self.inputs, feeds).items()}

    def _run(self, tensors: dict[str, Any]) -> dict[str, Any]:
        with tensorflow.device(self._device):
            found: dict[str, Any] = self._call(**tensors)
        return found

    def close(self) -> None:
        self._signature = self._call = None


class TfPrepared(HostBuffers):
    """TensorFlow takes tensors of its own: the copies in and out are part of a run, as in any use of it."""

    def __init__(self, runtime: TfRuntime, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        self._runtime = runtime
        super().__init__(inputs, outputs)

    def __call__(self) -> None:
        found = self._runtime._run(self._runtime._tensors(self.inputs))
        for name, array in self.outputs.items():
            np.copyto(array, found[name].numpy())


def _spec(name: str, spec: Any) -> TensorSpec:
    return TensorSpec(name, np.dtype(spec.dtype.as_numpy_dtype), tuple(spec.shape))
