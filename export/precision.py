"""A float32 ONNX model -> its fp16, bf16 and int8 variants, by ONNX Runtime's own tools.

fp16: onnxruntime.transformers.float16. bf16: the same graph with bfloat16 in the place of float16, its weights rounded
from float32. int8: onnxruntime.quantization, QuantizeLinear/DequantizeLinear pairs with per-channel weights, in two
forms: uint8 activations for ONNX Runtime and OpenVINO on a CPU, symmetric int8 for TensorRT and TensorRT-RTX.

By NVIDIA's nvidia-modelopt, an extra: fp8 (E4M3), and fp16 or bf16 by AutoCast, which keeps in float32 what would
overflow.

Inputs and outputs stay float32.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.errors import MissingPackage, ModelError, UsageError
from export.passes import quantizable

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}  # as ONNX Runtime calls them
FORMS = ("int8", "int8-symmetric")
# 256 levels between 0 and 1 leave nothing of the probabilities of 1000 classes, or of a sum of squares
IN_FLOAT = ("Softmax", "LogSoftmax", "LRN")


def to_half(model: Path, target: Path, precision: str, keep: Iterable[str] = ()) -> None:
    """Writes the fp16 or bf16 variant; the nodes named in `keep` stay in float32. Raises ModelError."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    original = onnx.load(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one line for each weight below float16's range
        half = convert_float_to_float16(onnx.shape_inference.infer_shapes(original), keep_io_types=True,
                                        disable_shape_infer=True, node_block_list=list(keep))
    if precision == "bf16":
        _as_bfloat16(half, {w.name: w for w in original.graph.initializer})
    del half.graph.value_info[:]
    _write(_sorted(half), target)


def autocast(model: Path, target: Path, precision: str, keep: Iterable[str] = ()) -> None:
    """Writes the fp16 or bf16 variant as modelopt's AutoCast makes it. Raises UsageError where that is missing."""
    with _modelopt("autocast") as module, _quiet():
        made = module.convert_to_mixed_precision(str(model), precision, _patterns(keep), keep_io_types=True)
    _write(made, target)


def to_fp8(model: Path, target: Path, images: Mapping[str, np.ndarray], keep: Iterable[str] = ()) -> None:
    """Writes the fp8 variant (E4M3, the rest float32), calibrated by modelopt. Raises UsageError as to_int8 does."""
    check_calibration(images)
    with _modelopt("quantization") as module, _quiet():
        module.quantize(str(model), "fp8", dict(images), calibration_eps=["cpu"], high_precision_dtype="fp32",
                        nodes_to_exclude=_patterns(keep), output_path=str(target), log_level="ERROR")


def _patterns(names: Iterable[str]) -> list[str]:
    return [f"{re.escape(name)}$" for name in names]


@contextlib.contextmanager
def _modelopt(name: str) -> Iterator[Any]:
    try:
        module = importlib.import_module(f"modelopt.onnx.{name}")
    except ImportError as error:
        raise MissingPackage("nvidia-modelopt", "not installed", "", "pip install 'enginesmith[modelopt]' into an "
                         "environment of its own: it brings PyTorch and pins an older ONNX Runtime") from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its calibration
        yield module


def _as_bfloat16(half: onnx.ModelProto, originals: Mapping[str, onnx.TensorProto]) -> None:
    import ml_dtypes

    kind = onnx.TensorProto
    for i, tensor in enumerate(half.graph.initializer):
        if tensor.data_type == kind.FLOAT16:
            source = onnx.numpy_helper.to_array(originals.get(tensor.name, tensor)).astype(ml_dtypes.bfloat16)
            rounded = kind(name=tensor.name, data_type=kind.BFLOAT16, dims=source.shape, raw_data=source.tobytes())
            half.graph.initializer[i].CopyFrom(rounded)
    for node in half.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == kind.FLOAT16:
                attribute.i = kind.BFLOAT16


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The converter appends its Casts; runtimes want producers before readers."""
    graph = ir.from_proto(model)
    graph.graph.sort()
    return ir.to_proto(graph)


def _write(model: onnx.ModelProto, target: Path) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"model {target.name}", " ".join(str(error).split())[:300], "a valid ONNX model") from error
    target.write_bytes(model.SerializeToString())


# --- int8 ------------------------------------------------------------------------------------------------------

def to_int8(model: Path, target: Path, form: str, images: Mapping[str, np.ndarray], method: str = "minmax",
            keep: Iterable[str] = (), chunk: int = 4, cache: Path | None = None) -> None:
    """Writes the int8 variant, calibrated on `images` (input name -> (count, ...)), `chunk` of them at a time.

    `cache`: where the ranges of all tensors are kept for the next call with the same model, images and method.

    The nodes named in `keep` stay in float32. Raises UsageError for calibration data that is not finite.
    """
    from onnxruntime import quantization as q

    if method not in METHODS:
        raise UsageError(f"calibration method {method!r}", "unknown", f"one of {', '.join(METHODS)}")
    check_calibration(images)
    keep, symmetric = tuple(keep), form == "int8-symmetric"
    with TemporaryDirectory(dir=target.parent) as folder, _quiet():
        prepared = Path(folder) / "float.onnx"
        ready = _quantizable(_folded(model, prepared), symmetric, frozenset(keep))
        _write(ready, prepared)
        in_float = [*keep, *(n.name for n in ready.graph.node if n.op_type in IN_FLOAT)]
        extra = {"ActivationSymmetric": symmetric, "WeightSymmetric": True,
                 "CalibStridedMinMax": 1,  # by chunk, in every method
                 "QuantizeBias": not symmetric}  # TensorRT takes a bias in float only
        q.quantize_static(
            str(prepared), str(target), _Reader(*_batches(ready, images, chunk)), quant_format=q.QuantFormat.QDQ,
            per_channel=True, activation_type=q.QuantType.QInt8 if symmetric else q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8, calibrate_method=q.CalibrationMethod[METHODS[method]],
            nodes_to_exclude=in_float, extra_options=extra, calibration_cache_path=cache)
    _write(_with_shared_scales(onnx.load(target)), target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantizer advises, by the root logger, a preparation that the exporter has done already."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def check_calibration(images: Mapping[str, np.ndarray]) -> None:
    for name, array in images.items():
        if not len(array):
            raise UsageError(f"calibration data of {name}", "no images", "one or more")
        finite = np.isfinite(array.reshape(len(array), -1)).all(1) if array.dtype.kind == "f" else np.ones(1, bool)
        if not finite.all():
            raise UsageError(f"calibration data of {name}", f"image {finite.argmin()} holds NaN or Inf",
                             "finite numbers", "leave that image out")


def _batches(model: onnx.ModelProto, images: Mapping[str, np.ndarray], chunk: int
             ) -> tuple[dict[str, np.ndarray], int]:
    """A model of a fixed batch takes whole batches: the first images fill up the last one."""
    dims: Any = next((v.type.tensor_type.shape.dim for v in model.graph.input if v.name in images), ())
    fixed = dims[0].dim_value if dims else 0
    if not fixed:
        return dict(images), chunk
    count = len(next(iter(images.values())))
    order = np.arange(-(-count // fixed) * fixed) % count
    return {name: array[order] for name, array in images.items()}, fixed


class _Reader:
    """What quantize_static takes its feeds from: it collects, and drops, the activations of one chunk at a time."""

    def __init__(self, images: Mapping[str, np.ndarray], chunk: int) -> None:
        count = len(next(iter(images.values())))
        self._chunks = [{name: array[start:start + chunk] for name, array in images.items()}
                        for start in range(0, count, chunk)]
        self._feeds = iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._feeds = iter(self._chunks[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _folded(path: Path, scratch: Path) -> onnx.ModelProto:
    """A model from elsewhere with its weights as constants, batch norms folded, in an opset with per-channel QDQ."""
    import onnxruntime

    model = onnx.load(path)
    if model.producer_name == "enginesmith":
        return model
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(scratch)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(scratch)
    if next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < 13:
        model = onnx.version_converter.convert_version(model, 17)
    return onnx.shape_inference.infer_shapes(model)


def _quantizable(proto: onnx.ModelProto, symmetric: bool, keep: frozenset[str]) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    for i, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{i}"  # the quantizer knows nodes by name
    quantizable.depthwise_norms(model)
    if not symmetric:  # TensorRT has an integer average pool
        quantizable.depthwise_pools(model, keep)
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _with_shared_scales(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    quantizable.share_scales(model)
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)
