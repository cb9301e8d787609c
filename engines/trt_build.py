"""TensorRT and TensorRT-RTX engines from an ONNX file, strongly typed: the file says the precision of every tensor.

TensorRT-RTX builds with no GPU at hand, for the compute capabilities asked for. Both have the same Python API; what
one of them lacks is asked of the module itself.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from engines.digest import sha256
from engines.errors import BuildError
from engines.runtime import BuildRequest, Built, TensorSpec, missing

PACKAGES = {"tensorrt": ("tensorrt", "tensorrt-cu13", "gpu"),
            "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13", "rtx")}
SMALLEST_WORKSPACE = 64 << 20  # bytes; below it few convolutions have a tactic left
LARGEST_WORKSPACE = 4 << 30


def module(runtime: str) -> Any:
    """tensorrt or tensorrt_rtx. Raises RuntimeUnavailable that says what to install."""
    name, package, extra = PACKAGES[runtime]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing(package, extra) from error


def build(request: BuildRequest, target: Path, progress: Callable[[str], None]) -> Built:
    """Writes a serialized engine. Raises BuildError; Ctrl-C stops the build within one step of the builder."""
    trt = module(request.runtime)
    cache = target.parent / f"{request.runtime}.timing"
    workspace, log = request.options.workspace_bytes, _log(trt)
    while True:
        log.messages.clear()
        builder = trt.Builder(log)
        network, parser = _parsed(trt, builder, log, request)
        config = _config(trt, builder, network, request, workspace)
        timing = _timing_cache(config, cache) if request.runtime == "tensorrt" else None
        plan = _serialized(trt, builder, network, config, progress)
        if plan is not None:
            break
        if request.options.strip_weights and request.device == "cpu":
            raise BuildError(f"{request.runtime} without weights", log.reason(), "a GPU while building",
                             "build with --device cuda:0, or with the weights in")
        smaller = (workspace or 2 * LARGEST_WORKSPACE) // 2
        if not _out_of_memory(log.messages) or smaller < SMALLEST_WORKSPACE:
            raise BuildError(f"{request.runtime}, {request.model.name}", log.reason(), "a model it can build")
        workspace = smaller
        progress(f"out of memory; again with {workspace >> 20} MiB of workspace")
    target.write_bytes(plan)
    if timing is not None:
        cache.write_bytes(config.get_timing_cache().serialize())
    tf32 = request.precision == "tf32"
    layers, source = compute_precisions(trt, network, tf32), "the strongly typed network that was built"
    del parser  # it owns the weights that the network points to
    seen = {} if request.device == "cpu" else inspected(_inspector_text(trt, log, plan, network), tf32)
    if seen:
        layers, source = seen, "the engine inspector"
    return Built(layers, source, tf32, {
        "workspace_bytes": workspace, "timing_cache": timing and {"file": timing, "sha256": sha256(cache)},
        # a plan does not say it without a GPU
        "inputs": [_tensor(trt, network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(trt, network.get_output(i)) for i in range(network.num_outputs)]})


def _tensor(trt: Any, tensor: Any) -> dict[str, Any]:
    return TensorSpec(tensor.name, np.dtype(trt.nptype(tensor.dtype)),
                      tuple(None if n == -1 else n for n in tensor.shape)).described()


def _inspector_text(trt: Any, log: Any, plan: bytes, network: Any) -> str:
    """What the plan says of its layers at the best batch of its first profile; needs a GPU."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    context, inspector = engine.create_execution_context(), engine.create_engine_inspector()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        context.set_input_shape(name, engine.get_tensor_profile_shape(name, 0)[1])
    inspector.execution_context = context  # without one, the types of open shapes are not told
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def inspected(text: str, tf32: bool) -> dict[str, int]:
    """Compute layers of the engine inspector's JSON by the type of their first input; none where it tells no types.

    Format: NVIDIA TensorRT developer guide, "Engine Inspector", detailed verbosity.
    """
    kinds = ("convolution", "deconvolution", "matrixmultiply", "matrix_multiply", "gemm")
    types = (("int8", "int8"), ("fp8", "fp8"), ("e4m3", "fp8"), ("bf16", "bf16"), ("bfloat16", "bf16"),
             ("half", "fp16"), ("fp16", "fp16"), ("float", "tf32" if tf32 else "fp32"),
             ("fp32", "tf32" if tf32 else "fp32"))
    counted: Counter[str] = Counter()
    for layer in json.loads(text).get("Layers", []):
        if not isinstance(layer, dict) or not layer.get("Inputs"):
            continue
        kind = str(layer.get("ParameterType", layer.get("LayerType", ""))).lower()
        told = layer["Inputs"][0].get("Format/Datatype", layer["Inputs"][0].get("Datatype", "")).lower()
        found = next((precision for word, precision in types if word in told), None)
        if any(k in kind for k in kinds) and found is not None:
            counted[found] += 1
    return dict(counted)


def _log(trt: Any) -> Any:
    """Keeps what the builder says, to tell the reason of a failure."""
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.messages.append(" ".join(message.split()))

        def reason(self) -> str:
            return (self.messages[0] if self.messages else "the builder gave no reason")[:400]

    return Log()


def _out_of_memory(messages: list[str]) -> bool:
    return any("memory" in m.lower() and ("out of" in m.lower() or "insufficient" in m.lower()) for m in messages)


def _parsed(trt: Any, builder: Any, log: Any, request: BuildRequest) -> tuple[Any, Any]:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(request.model)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        where = next((f"node {e.node_name() or e.node()} ({e.node_operator()}): {e.desc()}" for e in errors),
                     log.reason())
        raise BuildError(f"{request.runtime}, {request.model.name}", where[:400], "a model its parser knows")
    return network, parser


def _config(trt: Any, builder: Any, network: Any, request: BuildRequest, workspace: int | None) -> Any:
    config, options = builder.create_builder_config(), request.options
    flags = {"TF32": request.precision == "tf32", "VERSION_COMPATIBLE": options.version_compatible,
             "STRIP_PLAN": options.strip_weights, "REFIT_IDENTICAL": options.strip_weights}
    for name, on in flags.items():
        (config.set_flag if on else config.clear_flag)(getattr(trt.BuilderFlag, name))
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    _set_targets(trt, config, request)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in request.profiles:
        _add_profile(builder, network, config, profile)
    return config


def _set_targets(trt: Any, config: Any, request: BuildRequest) -> None:
    names = request.options.compute_capabilities
    if not names:
        return
    if request.runtime != "tensorrt-rtx":
        raise BuildError("compute capability", f"{request.runtime} builds for the GPU at hand", "tensorrt-rtx")
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        if f"SM{name}" not in known:
            raise BuildError(f"compute capability {name!r}", "unknown", ", ".join(k.removeprefix("SM") for k in known))
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{name}"), i)


def _add_profile(builder: Any, network: Any, config: Any, profile: Any) -> None:
    shapes = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        rest = tuple(tensor.shape)[1:]
        if -1 in rest:
            raise BuildError(f"input {tensor.name}", f"shape {tuple(tensor.shape)}", "every size known but the batch",
                             "export it again with --size")
        if len(tensor.shape) and tensor.shape[0] == -1:
            shapes.set_shape(tensor.name, *((n, *rest) for n in (profile.min, profile.opt, profile.max)))
    config.add_optimization_profile(shapes)


def _timing_cache(config: Any, path: Path) -> str:
    data = path.read_bytes() if path.exists() else b""
    config.set_timing_cache(config.create_timing_cache(data), ignore_mismatch=False)
    return path.name


def _serialized(trt: Any, builder: Any, network: Any, config: Any, progress: Callable[[str], None]) -> bytes | None:
    """The plan, built on a second thread so that Ctrl-C reaches this one; None if the builder failed."""
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            while not future.done():
                with suppress(NotYet):
                    future.exception(0.1)
        except KeyboardInterrupt:
            monitor.stopped = True
            raise
    config.progress_monitor = None
    plan = future.result()
    return None if plan is None else bytes(plan)


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        stopped = False

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                progress(name)

        def step_complete(self, name: str, step: int) -> bool:
            return not self.stopped

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def compute_precisions(trt: Any, network: Any, tf32: bool) -> dict[str, int]:
    """Convolutions and matrix products by the type they compute in: where both operands come dequantized, from what."""
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    names = {trt.DataType.FLOAT: "tf32" if tf32 else "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16",
             trt.DataType.INT8: "int8", trt.DataType.FP8: "fp8"}
    producers, counted = {}, Counter[str]()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for j in range(layer.num_outputs):
            producers[layer.get_output(j).name] = layer
        if layer.type in kinds:
            fed = [layer.get_input(j) for j in range(min(2, layer.num_inputs))]
            sources = [producers[t.name] for t in fed if t is not None and t.name in producers]
            dequantized = len(sources) == 2 and all(s.type == trt.LayerType.DEQUANTIZE for s in sources)
            dtype = sources[0].get_input(0).dtype if dequantized else layer.get_output(0).dtype
            counted[names.get(dtype, str(dtype))] += 1
    return dict(counted)
