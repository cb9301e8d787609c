"""Channels-last to channels-first: Transposes sink to the outputs and cancel.

TensorFlow computes on NHWC, ONNX's convolutions and pools on NCHW, so tf2onnx puts a Transpose on both sides of each.
One walk in topological order removes them. It keeps, for a value `v`, a source and a permutation with

    v = Transpose(s, p)

and rewrites each node that reads such values to read their sources, where `f` permits it:

    f(Transpose(s, p), ...)         = Transpose(f(s, ...), p)      f elementwise; constants permuted by inverse(p)
    f(Transpose(s, p), axis=k)      = Transpose(f(s, axis=p[k]), p)     Concat, Softmax, Split, Reduce*, Pad, ...
    Transpose(Transpose(s, p), q)   = Transpose(s, p[q])
    Reshape(Transpose(s, p))        = Reshape(s)                   if only dimensions of size 1 change places
    Reshape(Transpose(s, p)) @ W    = Reshape(s) @ permuted rows of W       a flatten before a dense layer
    Transpose(s, NHWC) @ W          = Transpose(Conv1x1(s, W'), NHWC)       a dense layer on a feature map

Whatever still reads a permuted value afterwards (an output, an op without a rule) gets one Transpose for it.
Graph inputs count as permuted from the start, so the one Transpose that is left stands right behind the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from export.passes.constants import reshape_target
from export.passes.values import attributes, constant, dims, integer, ints, make_constant, make_node, replace

Perm = tuple[int, ...]
ELEMENTWISE = frozenset(
    "Abs Acos Add And Asin Atan BitShift Cast Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or "
    "PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Tan Tanh ThresholdedRelu "
    "Where Xor".split())


def inverse(perm: Sequence[int]) -> Perm:
    return tuple(int(i) for i in np.argsort(perm))


def to_channels_first(rank: int) -> Perm:
    return (0, rank - 1, *range(1, rank - 1))


def sink_transposes(model: ir.Model) -> None:
    _Sink(model.graph).run()


@dataclass
class _Sink:
    graph: ir.Graph
    # v -> (s, p) with v = Transpose(s, p)
    sources: dict[ir.Value, tuple[ir.Value, Perm]] = field(default_factory=dict)
    inputs: dict[ir.Value, ir.Value] = field(default_factory=dict)  # the input's Transpose -> the input

    def run(self) -> None:
        nodes = list(self.graph)
        self._permute_inputs(nodes)
        rewritten = [node for node in nodes if self._rewrite(node)]
        for node in reversed(rewritten):
            for value in node.outputs:
                if value in self.sources and (tuple(value.uses()) or value.is_graph_output()):
                    self._materialize(value, node)
            self.graph.remove(node, safe=True)

    def _permute_inputs(self, nodes: Sequence[ir.Node]) -> None:
        for value in self.graph.inputs:
            shape = value.shape
            if nodes and shape is not None and len(shape) >= 3:
                first = to_channels_first(len(shape))
                transposed = make_node(nodes[0], "Transpose", [value], {"perm": first},
                                       ir.Shape([shape[i] for i in first]), value.dtype, f"{value.name}/transpose")
                self.sources[value] = transposed, inverse(first)
                self.inputs[transposed] = value

    def _materialize(self, value: ir.Value, before: ir.Node) -> None:
        source, perm = self.sources[value]
        if source in self.inputs:  # a Transpose of a Transpose is one of the input
            source, perm = self.inputs[source], tuple(to_channels_first(len(perm))[p] for p in perm)
            if _is_identity(perm):
                return
        out = make_node(before, "Transpose", [source], {"perm": perm}, value.shape, value.dtype)
        out.name = value.name
        value.replace_all_uses_with(out, replace_graph_outputs=True)

    def _rewrite(self, node: ir.Node) -> bool:
        """Whether `node` was replaced by one on the sources; it then stays, unread, until the walk has ended."""
        if not any(v in self.sources for v in node.inputs if v is not None):
            return node.op_type == "Transpose" and self._start(node)
        rule = _elementwise if node.op_type in ELEMENTWISE else RULES.get(node.op_type)
        return rule is not None and rule(self, node)

    def _start(self, node: ir.Node) -> bool:
        perm = ints(node, "perm")
        if perm is None or node.inputs[0] is None:
            return False
        self.sources[node.outputs[0]] = node.inputs[0], perm
        return True

    def put(self, node: ir.Node, inputs: Sequence[ir.Value | None], perms: Perm | None, out: ir.Value | None = None,
            **changed: object) -> bool:
        """A copy of `node` on `inputs`, with output `Transpose(copy, perms)`; without `perms` the output itself."""
        value = out or node.outputs[0]
        shape = value.shape
        if perms is not None and shape is not None:
            shape = ir.Shape([shape[i] for i in inverse(perms)])
        new = make_node(node, node.op_type, inputs, {**attributes(node), **changed}, shape, value.dtype)
        return self.put_value(value, new, perms)

    def put_value(self, old: ir.Value, new: ir.Value, perms: Perm | None) -> bool:
        if perms is None or perms == tuple(range(len(perms))):
            new.name = old.name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        else:
            self.sources[old] = new, perms
        return True

    def permuted(self, value: ir.Value | None, perm: Perm, node: ir.Node) -> ir.Value | None:
        """`s` with value = Transpose(s, perm), made if it is cheap: a constant, or a value of mostly 1s."""
        if value in self.sources and self.sources[value][1] == perm:
            return self.sources[value][0]
        array = constant(value)
        rank = len(perm)
        if array is not None and value is not None:
            if array.size == 1 and array.ndim <= 1:
                return value
            array = np.transpose(array.reshape((1,) * (rank - array.ndim) + array.shape), inverse(perm))
            return make_constant(self.graph, np.ascontiguousarray(array), f"{value.name}")
        sizes = dims(value)
        if value is None or sizes is None or value.shape is None or value in self.sources:
            return None
        if len(sizes) == 0:
            return value
        if len(sizes) != rank or sum(n != 1 for n in sizes) > 2:
            return None
        shape = ir.Shape([value.shape[i] for i in inverse(perm)])
        return make_node(node, "Transpose", [value], {"perm": inverse(perm)}, shape, value.dtype)


def _elementwise(sink: _Sink, node: ir.Node) -> bool:
    rank = len(node.outputs[0].shape or ())
    perm = next((p for s, p in (sink.sources[v] for v in node.inputs if v in sink.sources) if len(p) == rank), None)
    if perm is None:
        return False
    inputs = [None if v is None else sink.permuted(v, perm, node) for v in node.inputs]
    if any(new is None and old is not None for new, old in zip(inputs, node.inputs, strict=True)):
        return False
    return sink.put(node, inputs, perm)


def _transpose(sink: _Sink, node: ir.Node) -> bool:
    source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
    composed = tuple(perm[i] for i in ints(node, "perm") or reversed(range(len(perm))))
    return sink.put_value(node.outputs[0], source, composed) if not _is_identity(composed) else _forward(node, source)


def _is_identity(perm: Perm) -> bool:
    return perm == tuple(range(len(perm)))


def _forward(node: ir.Node, source: ir.Value) -> bool:
    """The node's readers read `source`, which keeps its name."""
    node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=False)
    return True


def _concat(sink: _Sink, node: ir.Node) -> bool:
    perm = next(sink.sources[v][1] for v in node.inputs if v in sink.sources)
    inputs = [sink.permuted(v, perm, node) for v in node.inputs]
    if any(v is None for v in inputs) or any(len(dims(v) or ()) != len(perm) for v in inputs):
        return False
    return sink.put(node, inputs, perm, axis=perm[integer(node, "axis", 0)])


def _on_axis(default: int) -> Callable[[_Sink, ir.Node], bool]:
    def rule(sink: _Sink, node: ir.Node) -> bool:
        source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
        axis = perm[integer(node, "axis", default)]
        if integer(node, "keepdims", 1) == 0:
            return False
        if len(node.outputs) == 1:
            return sink.put(node, [source, *node.inputs[1:]], perm, axis=axis)
        new = ir.node(node.op_type, [source, *node.inputs[1:]], {**attributes(node), "axis": axis},
                      num_outputs=len(node.outputs), name=node.name)
        sink.graph.insert_before(node, new)
        for old, out in zip(node.outputs, new.outputs, strict=True):
            if old.dtype is not None:
                out.dtype = old.dtype
            out.shape = None if old.shape is None else ir.Shape([old.shape[i] for i in inverse(perm)])
            sink.put_value(old, out, perm)
        return True
    return rule


def _axes(node: ir.Node, index: int, rank: int) -> tuple[int, ...] | None:
    """The axes of a node, from its input or its attribute, all of them where it names none; None if computed."""
    if len(node.inputs) > index and node.inputs[index] is not None:
        array = constant(node.inputs[index])
        axes = None if array is None else tuple(int(a) for a in array)
    else:
        axes = ints(node, "axes") or tuple(range(rank))
    return axes and tuple(a % rank for a in axes)


def _reduce(sink: _Sink, node: ir.Node) -> bool:
    source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
    axes = _axes(node, 1, len(perm))
    if axes is None:
        return False
    kept = [perm[i] for i in range(len(perm)) if i not in axes]
    out = perm if integer(node, "keepdims", 1) else tuple(sorted(kept).index(i) for i in kept)
    moved = sorted(perm[a] for a in axes)
    if "axes" in node.attributes:  # before opset 18
        return sink.put(node, [source], out, axes=moved)
    return sink.put(node, [source, make_constant(sink.graph, np.array(moved, np.int64), f"{node.name}/axes")], out)


def _pad(sink: _Sink, node: ir.Node) -> bool:
    source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
    pads, axes = constant(node.inputs[1]), _axes(node, 3, len(perm))
    if pads is None or axes is None:
        return False
    halves = np.zeros((2, len(perm)), np.int64)
    halves[:, [perm[a] for a in axes]] = pads.reshape(2, -1)
    new_pads = make_constant(sink.graph, halves.reshape(-1), f"{node.name}/pads")
    return sink.put(node, [source, new_pads, *node.inputs[2:3]], perm)


def _slice(sink: _Sink, node: ir.Node) -> bool:
    source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
    starts = constant(node.inputs[1])
    axes = _axes(node, 3, len(perm))
    if starts is None or axes is None:
        return False
    new_axes = np.array([perm[a] for a in axes[:len(starts)]], starts.dtype)
    inputs = [source, *node.inputs[1:3], make_constant(sink.graph, new_axes, f"{node.name}/axes")]
    return sink.put(node, [*inputs, *node.inputs[4:]], perm)


def _squeeze(sink: _Sink, node: ir.Node) -> bool:
    source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
    axes = _axes(node, 1, len(perm)) if len(node.inputs) > 1 else None
    if axes is None:
        return False
    kept = [perm[i] for i in range(len(perm)) if i not in axes]
    new_axes = make_constant(sink.graph, np.array(sorted(perm[a] for a in axes), np.int64), f"{node.name}/axes")
    return sink.put(node, [source, new_axes], tuple(sorted(kept).index(i) for i in kept))


def _unsqueeze(sink: _Sink, node: ir.Node) -> bool:
    """New dimensions between batch and channels stand there in both layouts."""
    source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or perm != inverse(to_channels_first(len(perm))):
        return False
    rank = len(perm) + len(axes)
    last, new = inverse(to_channels_first(rank)), [int(a) % rank for a in axes]
    if not all(0 < a < rank - 1 for a in new):
        return False
    new_axes = make_constant(sink.graph, np.array(sorted(last[a] for a in new), np.int64), f"{node.name}/axes")
    return sink.put(node, [source, new_axes], last)


def _resize(sink: _Sink, node: ir.Node) -> bool:
    source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
    operands = list(node.inputs[1:])
    for i, value in enumerate(operands):
        array = constant(value)
        if value is None or (array is not None and not array.size):
            continue
        if array is None or len(array) != len(perm) or "axes" in node.attributes:
            return False
        operands[i] = make_constant(sink.graph, array[list(inverse(perm))], f"{node.name}/{i}")
    return sink.put(node, [source, *operands], perm)


def _reshape(sink: _Sink, node: ir.Node) -> bool:
    source, perm = sink.sources[node.inputs[0]]  # type: ignore[index]
    sizes, target, shape = dims(source), constant(node.inputs[1]), dims(node.outputs[0])
    if sizes is None or target is None or shape is None:
        return False
    moved = [p for p in perm if sizes[p] != 1]
    if moved == sorted(moved):
        fixed = reshape_target(sizes, shape)
        if fixed is None:
            return False
        return sink.put(node, [source, make_constant(sink.graph, fixed, f"{node.name}/shape")], None)
    return _flatten(sink, node, source, perm, sizes, shape)


def _flatten(sink: _Sink, node: ir.Node, source: ir.Value, perm: Perm, sizes: tuple[int | None, ...],
             shape: tuple[int | None, ...]) -> bool:
    """(batch, ...) -> (batch, n), read by dense layers only: their rows take the source's order."""
    users = [use.node for use in node.outputs[0].uses()]
    dense = [u for u in users if u.op_type in ("MatMul", "Gemm") and u.inputs[0] is node.outputs[0]
             and constant(u.inputs[1]) is not None and not integer(u, "transB", 0)]
    if len(shape) != 2 or perm[0] != 0 or None in sizes[1:] or len(dense) != len(users) or not users:
        return False
    if shape[1] != int(np.prod(sizes[1:])):  # type: ignore[arg-type]
        return False
    fixed = reshape_target(sizes, shape)
    if fixed is None or node.outputs[0].is_graph_output():
        return False
    for user in dense:
        rows = constant(user.inputs[1])
        assert rows is not None
        as_map = rows.reshape(*(sizes[p] for p in perm[1:]), -1)  # type: ignore[arg-type]
        order = [i - 1 for i in inverse(perm)[1:]]
        permuted = np.ascontiguousarray(as_map.transpose(*order, len(perm) - 1)).reshape(rows.shape)
        user.replace_input_with(1, make_constant(sink.graph, permuted, str(user.inputs[1].name)))  # type: ignore
    return sink.put(node, [source, make_constant(sink.graph, fixed, f"{node.name}/shape")], None)


def _matmul(sink: _Sink, node: ir.Node) -> bool:
    """A dense layer on the channels of (batch, height, width, channels) is a 1x1 convolution."""
    left, right = node.inputs
    weights = constant(right)
    if left not in sink.sources or weights is None or weights.ndim != 2:
        return False
    source, perm = sink.sources[left]
    if len(perm) != 4 or perm != inverse(to_channels_first(4)):
        return False
    kernel = make_constant(sink.graph, np.ascontiguousarray(weights.T)[:, :, None, None], str(right.name))  # type: ignore
    shape = node.outputs[0].shape
    out = make_node(node, "Conv", [source, kernel], {"kernel_shape": [1, 1]},
                    None if shape is None else ir.Shape([shape[i] for i in to_channels_first(4)]), source.dtype)
    return sink.put_value(node.outputs[0], out, perm)


RULES: dict[str, Callable[[_Sink, ir.Node], bool]] = {
    "Transpose": _transpose, "Concat": _concat, "Pad": _pad, "Slice": _slice, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Resize": _resize, "Reshape": _reshape, "MatMul": _matmul,
    **{op: _on_axis(-1) for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{op: _on_axis(0) for op in ("Split", "ArgMax", "ArgMin")},
    **{f"Reduce{kind}": _reduce for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare",
                                             "LogSum", "LogSumExp")},
}


def reshape_unit_transposes(model: ir.Model) -> None:
    """Transpose(x, p) = Reshape(x) where only dimensions of size 1 change places; adjacent Reshapes become one."""
    for node in model.graph:
        if node.op_type == "Transpose":
            sizes, shape = dims(node.inputs[0]), dims(node.outputs[0])
            perm = ints(node, "perm") or ()
            moved = [p for p in perm if sizes is None or sizes[p] != 1]
            target = reshape_target(sizes, shape)
            if moved == sorted(moved) and target is not None:
                _reshaped(model, node, node.inputs[0], target)
        elif node.op_type == "Reshape":
            producer = node.inputs[0].producer() if node.inputs[0] is not None else None
            if producer is not None and producer.op_type == "Reshape":
                target = reshape_target(dims(producer.inputs[0]), dims(node.outputs[0]))
                if target is not None:
                    _reshaped(model, node, producer.inputs[0], target)


def _reshaped(model: ir.Model, node: ir.Node, source: ir.Value | None, target: np.ndarray) -> None:
    old = node.outputs[0]
    shape = make_constant(model.graph, target, f"{node.name}/shape")
    out = make_node(node, "Reshape", [source, shape], {}, old.shape, old.dtype)
    out.name = old.name
    replace(node, out)
