"""Where an engine departs: the first ONNX node, in order, whose output is further from float32 than the limit.

The model is given more outputs, a chunk at a time so that no more than CHUNK_BYTES of them are held, built in the
engine's runtime and precision, and compared with the float32 model in ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from engines import ort
from engines.errors import EngineError
from engines.runtime import BuildRequest, Feeds, Profile, backend
from pipeline.export import MODEL

CHUNK_BYTES = 256 << 20
DEQUANTIZED = "_DequantizeLinear_Output"  # as onnxruntime.quantization names it
CONSTANT = ("Constant", "ConstantOfShape")


def first_node(wish: BuildRequest, inputs: Mapping[str, np.ndarray], limit: float) -> str:
    """One line that names the node, or says that none departs alone or that it could not be searched."""
    source = wish.model.with_name(MODEL)
    try:
        for name, error in errors(source, wish, inputs):
            if not error <= limit:
                node = next(n for n in onnx.load(source).graph.node if name in n.output)
                label = node.name or f"of {name}"
                return f"first node that departs: {label} ({node.op_type}), relative L2 error {error:.2e}"
    except EngineError as error:
        return f"the first node that departs could not be searched ({error})"
    return "no single node departs by more than the limit"


def errors(source: Path, wish: BuildRequest, inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
    """(tensor, relative L2 error) in the order of the float32 model `source`, for the first of `inputs`."""
    feeds = {name: array[:1] for name, array in inputs.items()}
    original, model = onnx.load(source), onnx.load(wish.model)
    single = BuildRequest(wish.model, wish.runtime, wish.precision, wish.device, (Profile(1, 1, 1),), wish.options)
    for names in _chunks(original, model, feeds):
        truth = _outputs(original, BuildRequest(source, "onnxruntime"), names, feeds)
        found = _outputs(model, single, names, feeds)
        for name in (n for n in names if n in found):  # OpenVINO merges what a Dropout would part
            norm = float(np.linalg.norm(truth[name].astype(np.float64))) or 1.0
            yield name, float(np.linalg.norm(found[name].astype(np.float64) - truth[name])) / norm


def _chunks(original: onnx.ModelProto, model: onnx.ModelProto, feeds: Feeds) -> Iterator[list[str]]:
    """Float tensors that both models compute, in order, grouped so that their sizes stay under CHUNK_BYTES."""
    there = {name for node in model.graph.node for name in node.output}
    inferred = onnx.shape_inference.infer_shapes(original).graph
    sizes = {v.name: 4 * int(np.prod([d.dim_value or 1 for d in v.type.tensor_type.shape.dim]))
             for v in (*inferred.value_info, *inferred.output)
             if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    names: list[str] = []
    total = 0
    for node in original.graph.node:
        for name in node.output:
            if node.op_type in CONSTANT or name not in sizes or not {name, name + DEQUANTIZED} & there:
                continue
            if names and total + sizes[name] > CHUNK_BYTES:
                yield names
                names, total = [], 0
            names.append(name)
            total += sizes[name]
    if names:
        yield names


def _outputs(model: onnx.ModelProto, wish: BuildRequest, names: list[str], feeds: Feeds) -> dict[str, np.ndarray]:
    """The named tensors of `model`, built as `wish` says.

    A quantized tensor is what comes out of its DequantizeLinear: before it, it lacks the clipping of a merged Relu.
    """
    there = {name for node in model.graph.node for name in node.output}
    tapped = {f"{n}{DEQUANTIZED}" if f"{n}{DEQUANTIZED}" in there else n: n for n in names}
    return {tapped[name]: array for name, array in _tapped(model, wish, list(tapped), feeds).items()}


def _tapped(model: onnx.ModelProto, wish: BuildRequest, names: list[str], feeds: Feeds) -> dict[str, np.ndarray]:
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    module = backend(wish.runtime) if wish.runtime != "onnxruntime" else ort
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        path.write_bytes(_typed(tapped).SerializeToString())
        single = BuildRequest(path, wish.runtime, wish.precision, wish.device, wish.profiles, wish.options)
        target = Path(folder) / f"engine{module.SUFFIX}"
        module.build(single, target, lambda step: None)
        with module.load(single, target) as engine:
            return engine.run(feeds)


def _typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Outputs with the types and shapes that inference finds."""
    known = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    for value in model.graph.output:
        if value.name in known:
            value.CopyFrom(known[value.name])
    return model
