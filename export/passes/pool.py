"""An average pool goes behind the 1x1 convolution that reads it, where it has fewer channels to average.

    Conv1x1(AveragePool(x)) = AveragePool(Conv1x1(x))       both are linear, and the pool's weights sum to 1

That holds where a window averages what is there and not its padding (`count_include_pad` 0, or no pads); a bias is
then its own average. Inception's pool branches get 4 to 10 times less to average.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.values import attributes, constant, integer, ints, make_node, only_user, replace


def pool_after_pointwise(model: ir.Model) -> None:
    for pool in model.graph:
        conv = only_user(pool.outputs[0]) if pool.op_type == "AveragePool" else None
        if conv is None or not _narrowing(conv) or conv.inputs[0] is not pool.outputs[0]:
            continue
        if integer(pool, "count_include_pad", 0) and any(ints(pool, "pads") or ()):
            continue
        source, old = pool.inputs[0], conv.outputs[0]
        assert source is not None
        shape = None
        if source.shape is not None and old.shape is not None:
            shape = ir.Shape([source.shape[0], old.shape[1], *source.shape[2:]])
        narrow = make_node(conv, "Conv", [source, *conv.inputs[1:]], attributes(conv), shape, old.dtype)
        out = make_node(conv, "AveragePool", [narrow], attributes(pool), old.shape, old.dtype, name=pool.name)
        out.name = old.name
        replace(conv, out)
        model.graph.remove(pool, safe=True)


def _narrowing(node: ir.Node) -> bool:
    """A 1x1 convolution of stride 1, without groups and pads, that has fewer channels behind it than before it."""
    weights = constant(node.inputs[1]) if node.op_type == "Conv" else None
    return (weights is not None and set(weights.shape[2:]) == {1} and weights.shape[0] < weights.shape[1]
            and integer(node, "group", 1) == 1 and not any(ints(node, "pads") or ())
            and set(ints(node, "strides") or (1,)) == {1})
