"""Small questions about values of an onnx_ir graph, and the one way to make a constant or a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer; None for anything that is computed or fed."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def make_constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """A new initializer; `name` is made unique."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}_{count}", count + 1
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique), shape=ir.Shape(array.shape),
                     type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    graph.register_initializer(value)
    return value


def make_node(before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any],
              shape: ir.Shape | None, dtype: ir.DataType | None = None, name: str | None = None) -> ir.Value:
    """The only output of a new node that stands before node `before`."""
    node = ir.node(op_type, inputs, attributes, name=name or before.name)
    out = node.outputs[0]
    out.shape = shape
    if dtype is not None:
        out.dtype = dtype
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return out


def dims(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Static sizes, None for a symbolic one; None for an unknown rank."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, if there is just one and `value` is no output."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An integer list attribute."""
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else None


def integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else default


def attributes(node: ir.Node) -> dict[str, Any]:
    """A copy of the attributes, to build an altered node from."""
    return dict(node.attributes)


def replace(node: ir.Node, *replacements: ir.Value) -> None:
    """Puts `replacements` in the place of the outputs of `node` and removes it.

    An output of the graph is never replaced: convert.py ends every end point in an Identity of its own.
    """
    for old, new in zip(node.outputs, replacements, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
