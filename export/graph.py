"""The ordered list of graph clean-ups after conversion.

Each is a function of one model in export/passes, with its algebra in the file's header. `clean` works while every
end point is an output, so that shapes of all of them can be checked; `finish` then leaves the wished ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from export import onnx_file
from export.passes.constants import fix_reshape_targets, fold_constants
from export.passes.dense import unflatten_dense
from export.passes.fold import fold_affine, form_batch_norms, merge_pads
from export.passes.interface import set_interface
from export.passes.layout import reshape_unit_transposes, sink_transposes
from export.passes.pool import pool_after_pointwise
from export.passes.recover import drop_unit_height, resize_repeats


def clean(model: ir.Model) -> None:
    """Every pass in order, in place; outputs keep their names, order and layout."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fold_constants(model)
    fix_reshape_targets(model)
    drop_identities(model)
    common.RemoveUnusedNodesPass()(model)
    unflatten_dense(model)
    resize_repeats(model)
    sink_transposes(model)
    reshape_unit_transposes(model)
    drop_unit_height(model)
    fold_constants(model)
    fold_affine(model)
    merge_pads(model)
    pool_after_pointwise(model)
    form_batch_norms(model)
    common.RemoveUnusedNodesPass()(model)


def finish(model: ir.Model, outputs: Sequence[str], normalisation: str | None, channels_first: bool) -> None:
    """Leaves `outputs`, in that order, with what they need; sets what is fed and fetched; gives the final names."""
    by_name = {value.name: value for value in model.graph.outputs}
    model.graph.outputs[:] = [by_name[name] for name in outputs]
    common.RemoveUnusedNodesPass()(model)
    set_interface(model, normalisation, channels_first)
    reshape_unit_transposes(model)
    drop_identities(model)
    _merge_output_identities(model)
    common.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    rename(model)


def drop_identities(model: ir.Model) -> None:
    """Identity(x) = x, but for the one that ends every end point."""
    for node in model.graph:
        if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
            model.graph.remove(node, safe=True)


def _merge_output_identities(model: ir.Model) -> None:
    """An output takes the place of what its Identity reads, unless that is another output, an input or a weight."""
    for node in model.graph:
        source, out = node.inputs[0], node.outputs[0]
        if node.op_type != "Identity" or source is None or source.producer() is None or source.is_graph_output():
            continue
        source.name, source.shape = out.name, out.shape
        out.replace_all_uses_with(source, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def rename(model: ir.Model) -> None:
    """Nodes after the layer they come from, weights after their node: the same names in every conversion."""
    taken: dict[str, int] = {}
    fixed = {v.name for v in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        node.name = _unique(_layer(node), taken)
        for i, value in enumerate(node.outputs):
            if value.name not in fixed:
                value.name = f"{node.name}:{i}"
    for value in list(model.graph.initializers.values()):
        use = min(value.uses(), key=lambda u: (str(u.node.name), u.idx))
        del model.graph.initializers[str(value.name)]
        value.name = f"{use.node.name}/{_role(use.node.op_type, use.idx)}"
        if value.const_value is not None:
            value.const_value.name = value.name
        model.graph.initializers[value.name] = value
    ordered = sorted(model.graph.initializers.items())
    model.graph.initializers.clear()
    model.graph.initializers.update(ordered)


def _layer(node: ir.Node) -> str:
    """`vgg_16.conv1.conv1_1_1/BiasAdd__33` -> `vgg_16/conv1/conv1_1/Conv`: Keras numbers each trace of a layer."""
    scope = re.sub(r"__\d+$", "", str(node.name)).rsplit("/", 1)[0]
    return re.sub(r"_1$", "", scope).replace(".", "/") + "/" + node.op_type


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"


ROLES = {"Conv": ("x", "weights", "biases"), "Gemm": ("x", "weights", "biases"),
         "BatchNormalization": ("x", "scale", "bias", "mean", "variance"), "Reshape": ("x", "shape")}


def _role(op_type: str, index: int) -> str:
    return ROLES[op_type][index] if op_type in ROLES else f"operand_{index}"


def save(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the model with `metadata`, the same bytes for the same model."""
    model.producer_name, model.producer_version, model.graph.name = "enginesmith", "", metadata["enginesmith.network"]
    model.metadata_props.clear()
    model.metadata_props.update(sorted(metadata.items()))
    onnx_file.write(model, path)
