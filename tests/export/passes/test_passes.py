"""Each clean-up on small graphs: what it must change, what it must leave, and the same numbers before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.passes.constants import fold_constants, reshape_target
from export.passes.dense import unflatten_dense
from export.passes.fold import fold_affine, form_batch_norms, merge_pads
from export.passes.layout import reshape_unit_transposes, sink_transposes
from export.passes.pool import pool_after_pointwise
from export.passes.quantizable import depthwise_norms, depthwise_pools, share_scales
from export.passes.recover import drop_unit_height, resize_repeats

RNG = np.random.default_rng(0)


def parsed(body: str, shape: str, constants: dict[str, np.ndarray] | None = None) -> ir.Model:
    """`x` of `shape` to `y` by nodes in ONNX's text form; an Identity ends it, as convert.py leaves it."""
    text = f'<ir_version: 8, opset_import: ["" : 18]> g (float[{shape}] x) => (float y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for name, array in (constants or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def value(model: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def after(model: ir.Model, x: np.ndarray, *passes: Callable[[ir.Model], None]) -> dict[str, int]:
    """The operations that are left, but the final Identity, once the numbers are seen to be the same."""
    before = value(model, x)
    for one in passes:
        one(model)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    np.testing.assert_allclose(value(model, x), before, rtol=1e-4, atol=1e-5)
    return dict(Counter(node.op_type for node in model.graph if node.op_type != "Identity"))


# --- pads ------------------------------------------------------------------------------------------------------

PADS = {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1], np.int64), "w": weights(4, 3, 3, 3)}


def pads(body: str, **constants: np.ndarray) -> dict[str, int]:
    return after(parsed(body, "N,3,6,6", PADS | constants), weights(2, 3, 6, 6), merge_pads)


def test_pad_into_convolution() -> None:
    assert pads("a = Pad (x, p) b = Conv <pads = [1,1,1,1]> (a, w) y = Identity (b)") == {"Conv": 1}


@pytest.mark.parametrize(("body", "why"), [
    ("a = Pad (x, p) b = MaxPool <kernel_shape = [3,3]> (a) y = Identity (b)", "x may be negative"),
    ("r = Relu (x) a = Pad (r, p) b = MaxPool <kernel_shape = [2,2]> (a) y = Identity (b)", "a window of zeros only"),
    ("a = Pad <mode = \"reflect\"> (x, p) b = Conv (a, w) y = Identity (b)", "not zeros"),
    ("a = Pad (x, p, one) b = Conv (a, w) y = Identity (b)", "not zeros"),
    ("a = Pad (x, p) b = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (a) y = Identity (b)", "not counted"),
    ("a = Pad (x, c) b = Conv (a, v) y = Identity (b)", "channels are padded"),
    ("a = Pad (x, p) b = Conv (a, w) s = ReduceMean (a) d = Add (b, s) y = Identity (d)", "another reader"),
    ("a = Pad (x, m) b = Conv (a, w) y = Identity (b)", "a negative pad crops"),
    ("a = Pad (x, p) b = Conv <auto_pad = \"SAME_UPPER\"> (a, w) y = Identity (b)", "auto_pad depends on the size"),
])
def test_pad_that_stays(body: str, why: str) -> None:
    left = pads(body, one=np.ones((), np.float32), c=np.array([0, 1, 0, 0, 0, 0, 0, 0], np.int64),
                v=weights(4, 4, 3, 3), m=np.array([0, 0, -1, 0, 0, 0, 0, 0], np.int64))
    assert left["Pad"] == 1, why


def test_pad_into_max_pool_after_relu_and_into_a_counting_average() -> None:
    assert "Pad" not in pads("r = Relu (x) a = Pad (r, p) b = MaxPool <kernel_shape = [3,3]> (a) y = Identity (b)")
    assert "Pad" not in pads("a = Pad (x, p) b = AveragePool <kernel_shape = [3,3], count_include_pad = 1> (a) "
                             "y = Identity (b)")


# --- affine ----------------------------------------------------------------------------------------------------

AFFINE = {"w": weights(4, 3, 3, 3), "b": weights(4), "s": weights(1, 4, 1, 1) + 3, "t": weights(4, 1, 1),
          "one": np.array(2.5, np.float32), "map": weights(1, 4, 4, 4), "row": weights(1, 1, 1, 4)}


def affine(body: str) -> dict[str, int]:
    return after(parsed(body, "N,3,6,6", AFFINE), weights(2, 3, 6, 6), fold_affine)


def test_affine_into_convolution() -> None:
    assert affine("a = Conv (x, w, b) c = Mul (a, s) d = Add (t, c) e = Sub (d, one) f = Div (e, s) y = Identity (f)"
                  ) == {"Conv": 1}


@pytest.mark.parametrize(("body", "left"), [
    ("a = Conv (x, w) c = Mul (a, s) d = Add (c, a) y = Identity (d)", {"Conv": 1, "Mul": 1, "Add": 1}),
    ("a = Conv (x, w) c = Mul (a, map) y = Identity (c)", {"Conv": 1, "Mul": 1}),
    ("a = Conv (x, w) c = Add (a, row) y = Identity (c)", {"Conv": 1, "Add": 1}),
    ("a = Conv (x, w) c = Sub (one, a) y = Identity (c)", {"Conv": 1, "Sub": 1}),
    ("a = Conv (x, w) c = Div (one, a) y = Identity (c)", {"Conv": 1, "Div": 1}),
    ("a = Conv (x, w) r = Relu (a) c = Mul (r, s) y = Identity (c)", {"Conv": 1, "Relu": 1, "Mul": 1}),
])
def test_affine_that_stays(body: str, left: dict[str, int]) -> None:
    assert affine(body) == left


def test_affine_into_dense_and_transposed_convolution() -> None:
    dense = parsed("a = MatMul (x, w) c = Add (a, b) d = Mul (c, b) y = Identity (d)", "N,6",
                   {"w": weights(6, 4), "b": weights(4)})
    assert after(dense, weights(3, 6), fold_affine) == {"Gemm": 1}
    grouped = parsed("a = ConvTranspose <group = 2> (x, w) c = Mul (a, s) y = Identity (c)", "N,4,5,5",
                     {"w": weights(4, 2, 3, 3), "s": weights(1, 4, 1, 1)})
    assert after(grouped, weights(2, 4, 5, 5), fold_affine) == {"ConvTranspose": 1, "Mul": 1}


def test_scale_and_shift_of_a_sum_become_one_batch_norm() -> None:
    model = parsed("r = Relu (x) a = Add (x, r) c = Mul (a, s) d = Add (c, t) y = Identity (d)", "N,4,6,6", AFFINE)
    assert after(model, weights(2, 4, 6, 6), form_batch_norms) == {"Relu": 1, "Add": 1, "BatchNormalization": 1}
    scalar = parsed("r = Relu (x) c = Mul (r, one) d = Add (c, one) y = Identity (d)", "N,4,6,6", AFFINE)
    assert after(scalar, weights(2, 4, 6, 6), form_batch_norms) == {"Relu": 1, "Mul": 1, "Add": 1}


# --- pools -----------------------------------------------------------------------------------------------------

POINTWISE = {"n": weights(2, 3, 1, 1), "w": weights(4, 3, 1, 1), "b": weights(2), "big": weights(2, 3, 3, 3)}


@pytest.mark.parametrize(("body", "first"), [
    ("a = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (x) c = Conv (a, n, b) y = Identity (c)", "Conv"),
    ("a = AveragePool <kernel_shape = [2,2], strides = [2,2], count_include_pad = 1> (x) c = Conv (a, n, b) "
     "y = Identity (c)", "Conv"),
    # padding that is counted, a wider and a larger convolution, a stride, another reader
    ("a = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (x) c = Conv (a, n, b) "
     "y = Identity (c)", "AveragePool"),
    ("a = AveragePool <kernel_shape = [3,3]> (x) c = Conv (a, w) y = Identity (c)", "AveragePool"),
    ("a = AveragePool <kernel_shape = [3,3]> (x) c = Conv (a, big) y = Identity (c)", "AveragePool"),
    ("a = AveragePool <kernel_shape = [2,2]> (x) c = Conv <strides = [2,2]> (a, n) y = Identity (c)", "AveragePool"),
    ("a = AveragePool <kernel_shape = [3,3]> (x) c = Conv (a, n) m = ReduceMean (a) d = Add (c, m) y = Identity (d)",
     "AveragePool"),
])
def test_average_pool_behind_a_narrowing_convolution(body: str, first: str) -> None:
    model = parsed(body, "N,3,6,6", POINTWISE)
    after(model, weights(2, 3, 6, 6), pool_after_pointwise)
    assert next(iter(model.graph)).op_type == first


# --- constants -------------------------------------------------------------------------------------------------

def test_constants_fold_but_a_large_expand_stays_computed() -> None:
    model = parsed("k = Transpose <perm = [1,0]> (w) a = MatMul (x, k) e = Expand (one, big) s = ReduceSum (e) "
                   "c = Add (a, s) y = Identity (c)", "N,6",
                   {"w": weights(4, 6), "one": np.ones(1, np.float32), "big": np.array([1000, 1000], np.int64)})
    assert after(model, weights(2, 6), fold_constants) == {"MatMul": 1, "Expand": 1, "ReduceSum": 1, "Add": 1}


def test_dense_layer_on_tokens_needs_no_matrix() -> None:
    model = parsed("a = Reshape (x, flat) b = MatMul (a, w) c = Reshape (b, out) y = Identity (c)", "N,5,6",
                   {"w": weights(6, 4), "flat": np.array([-1, 6], np.int64), "out": np.array([-1, 5, 4], np.int64)})
    assert after(model, weights(2, 5, 6), unflatten_dense) == {"MatMul": 1}


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(batch=st.integers(1, 5), source=sizes, data=st.data())
def test_reshape_target_holds_for_every_batch(batch: int, source: list[int], data: st.DataObject) -> None:
    """The oracle is NumPy: the same elements, in the true shape that (None, ...) stands for at this batch."""
    target = data.draw(st.sampled_from([list(reversed(source)), [int(np.prod(source))], [1, *source], [*source, 1]]))
    x = np.arange(batch * int(np.prod(source))).reshape(batch, *source)
    fixed = reshape_target((None, *source), (None, *target))
    assert fixed is not None
    shape = [x.shape[i] if n == 0 else int(n) for i, n in enumerate(fixed)]
    assert np.array_equal(x.reshape(shape), x.reshape(batch, *target))


def test_reshape_target_refuses_what_one_constant_cannot_say() -> None:
    assert reshape_target((None, None, 4), (None, 2, None)) is None
    assert reshape_target(None, (None, 4)) is None
    assert reshape_target((None, 4), None) is None


# --- operations put together again -----------------------------------------------------------------------------

REPEAT = {"a": np.array([2], np.int64), "two": np.array([1, 1, 2, 1], np.int64), "out": np.array([-1, 8, 3], np.int64),
          "wrong": np.array([-1, 4, 6], np.int64), "first": np.array([1], np.int64),
          "along": np.array([1, 2, 1, 1], np.int64)}


def test_repeat_is_a_resize() -> None:
    body = "u = Unsqueeze (x, {}) t = Tile (u, {}) r = Reshape (t, {}) y = Identity (r)"
    repeated = parsed(body.format("a", "two", "out"), "N,4,3", REPEAT)
    assert after(repeated, weights(2, 4, 3), resize_repeats) == {"Resize": 1}
    for axes, times, target in (("a", "two", "wrong"), ("first", "along", "out")):  # another merge; a block repeated
        tiled = parsed(body.format(axes, times, target), "N,4,3", REPEAT)
        assert after(tiled, weights(2, 4, 3), resize_repeats)["Tile"] == 1


def test_repeats_of_both_sides_are_one_resize() -> None:
    scales = {"s": np.array([1, 1, 2, 1], np.float32), "t": np.array([1, 1, 1, 3], np.float32),
              "half": np.array([1, 1, 1.5, 1], np.float32)}
    body = " ".join(f'{out} = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", '
                    f'nearest_mode = "floor"> ({fed}, , {{}})' for fed, out in (("x", "a"), ("a", "b")))
    body += " y = Identity (b)"
    whole = parsed(body.format("s", "t"), "N,2,4,3", scales)
    assert after(whole, weights(2, 2, 4, 3), resize_repeats) == {"Resize": 1}
    part = parsed(body.format("half", "t"), "N,2,4,3", scales)
    assert after(part, weights(2, 2, 4, 3), resize_repeats) == {"Resize": 2}


def test_window_of_height_one_is_one_dimensional() -> None:
    constants = {"a": np.array([2], np.int64), "w": weights(5, 3, 1, 3), "tall": weights(5, 3, 3, 3)}
    body = "u = Unsqueeze (x, a) c = {} s = Squeeze (c, a) y = Identity (s)"
    flat = parsed(body.format("Conv <pads = [0,1,0,2], strides = [1,2]> (u, w)"), "N,3,9", constants)
    assert after(flat, weights(2, 3, 9), drop_unit_height) == {"Conv": 1}
    pool = parsed(body.format("MaxPool <kernel_shape = [1,2], pads = [0,1,0,0]> (u)"), "N,3,9", constants)
    assert after(pool, weights(2, 3, 9), drop_unit_height) == {"MaxPool": 1}
    tall = parsed(body.format("Conv <pads = [1,1,1,1]> (u, tall)"), "N,3,9", constants)
    assert after(tall, weights(2, 3, 9), drop_unit_height)["Squeeze"] == 1


# --- layout ----------------------------------------------------------------------------------------------------

NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
STEPS = ("conv", "pool", "relu", "add", "scale", "concat", "pad", "softmax", "mean", "split", "slice", "self")


def _channels_last(steps: list[str]) -> ir.Model:
    """TensorFlow's way: every step on (N, H, W, 4), a Transpose on both sides of each convolution and pool."""
    nodes, constants, last = [], {}, "x"

    def put(op: str, *inputs: str, outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"v{len(nodes)}_{i}" for i in range(outputs)]
        nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def const(array: np.ndarray) -> str:
        constants[f"c{len(constants)}"] = array
        return f"c{len(constants) - 1}"

    def window(op: str, *more: str, **attributes: object) -> str:
        first = put("Transpose", last, perm=NCHW)[0]
        return put("Transpose", put(op, first, *more, **attributes)[0], perm=NHWC)[0]

    for step in steps:
        if step == "conv":
            last = window("Conv", const(weights(4, 4, 3, 3)), pads=[1, 1, 1, 1])
        elif step == "pool":
            last = window("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        elif step == "relu":
            last = put("Relu", last)[0]
        elif step == "add":
            last = put("Add", last, const(weights(4)))[0]
        elif step == "scale":
            last = put("Mul", const(weights(5, 1, 4)), last)[0]
        elif step == "self":
            last = put("Add", last, put("Tanh", last)[0])[0]
        elif step == "concat":
            both = put("Concat", last, put("Tanh", last)[0], axis=3)[0]
            last = put("Slice", both, *(const(np.array([n], np.int64)) for n in (2, 6, 3)))[0]
        elif step == "pad":
            padded = put("Pad", last, const(np.array([0, 1, 0, 0, 0, 0, 0, 0], np.int64)))[0]
            last = put("Slice", padded, *(const(np.array([n], np.int64)) for n in (0, 5, 1)))[0]
        elif step == "softmax":
            last = put("Softmax", last, axis=-1)[0]
        elif step == "mean":
            last = put("Sub", last, put("ReduceMean", last, const(np.array([1, 3], np.int64)), keepdims=1)[0])[0]
        elif step == "split":
            left, right = put("Split", last, outputs=2, axis=3, num_outputs=2)
            last = put("Concat", right, left, axis=-1)[0]
        elif step == "slice":
            turned = put("Transpose", last, perm=[0, 2, 1, 3])[0]
            last = put("Slice", turned, *(const(np.array([n], np.int64)) for n in (-1, -10, 1, -1)))[0]
    put("Identity", last)
    nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("N", 5, 5, 4))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=7))
def test_layout_change_keeps_the_numbers_and_leaves_a_transpose_at_each_end(steps: list[str]) -> None:
    left = after(_channels_last(steps), weights(2, 5, 5, 4), sink_transposes, reshape_unit_transposes)
    assert left.get("Transpose", 0) <= 2 + steps.count("slice")  # a slice turns height and width


def test_flatten_permutes_the_rows_of_the_dense_layers_that_read_it() -> None:
    body = ("a = Transpose <perm = [0,2,3,1]> (x) f = Reshape (a, t) b = Relu (f) y = Identity (b)",
            "a = Transpose <perm = [0,2,3,1]> (x) f = Reshape (a, t) b = MatMul (f, w) c = MatMul (f, v) "
            "d = Add (b, c) y = Identity (d)")
    constants = {"t": np.array([-1, 36], np.int64), "w": weights(36, 2), "v": weights(36, 2)}
    kept, gone = (after(parsed(one, "N,4,3,3", constants), weights(2, 4, 3, 3), sink_transposes) for one in body)
    assert kept["Transpose"] >= 1
    assert gone.get("Transpose", 0) == 1  # the graph's own input counts as channels last


# --- forms that quantize well --------------------------------------------------------------------------------------

def test_batch_norm_as_depthwise_convolution() -> None:
    constants = {"s": weights(4), "b": weights(4), "m": weights(4), "v": np.abs(weights(4)) + 0.1}
    model = parsed("z = BatchNormalization <epsilon = 0.001> (x, s, b, m, v) y = Identity (z)", "2,4,5,5", constants)
    assert after(model, weights(2, 4, 5, 5), depthwise_norms) == {"Conv": 1}


@pytest.mark.parametrize(("attributes", "shape", "left"), [
    ("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", "N,4,7,9", {"Conv": 1, "Mul": 1}),
    ("kernel_shape = [3, 3], pads = [0, 1, 1, 0], strides = [2, 2]", "N,4,8,8", {"Conv": 1, "Mul": 1}),
    ("kernel_shape = [2, 2], strides = [2, 2]", "N,4,8,8", {"Conv": 1}),
    ("kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1", "N,4,7,9", {"Conv": 1}),
    ("kernel_shape = [7, 7]", "N,4,7,7", {"AveragePool": 1}),
    ("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", "N,4,H,9", {"AveragePool": 1}),
    ("kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1", "N,4,7,9", {"AveragePool": 1}),
    ("kernel_shape = [3], pads = [1, 1]", "N,4,7", {"AveragePool": 1}),
])
def test_average_pool_as_depthwise_convolution(attributes: str, shape: str, left: dict[str, int]) -> None:
    model = parsed(f"z = AveragePool <{attributes}> (x) y = Identity (z)", shape)
    sizes = [{"N": 3, "H": 7}.get(n) or int(n) for n in shape.split(",")]
    assert after(model, weights(*sizes), depthwise_pools) == left


def test_operands_of_a_concatenation_take_its_scale_but_a_pool_keeps_its_own() -> None:
    constants = {name: np.array(scale, np.float32) for name, scale in (("s1", 0.1), ("s2", 0.2), ("s3", 0.4))}
    model = parsed("""
        a = Relu (x)  aq = QuantizeLinear (a, s1, zero)  ad = DequantizeLinear (aq, s1, zero)
        b = Neg (x)  bq = QuantizeLinear (b, s2, zero)  bd = DequantizeLinear (bq, s2, zero)
        p = MaxPool <kernel_shape = [1, 1]> (bd)
        pq = QuantizeLinear (p, s2, zero)  pd = DequantizeLinear (pq, s2, zero)
        c = Concat <axis = 1> (ad, pd)  cq = QuantizeLinear (c, s3, zero)  cd = DequantizeLinear (cq, s3, zero)
        y = Identity (cd)""", "1,2,3,3", {**constants, "zero": np.array(0, np.uint8)})
    share_scales(model)
    scales = {node.outputs[0].name: node.inputs[1].name for node in model.graph if "uantize" in node.op_type}
    assert scales == {"aq": "s3", "ad": "s3", "bq": "s2", "bd": "s2", "pq": "s2", "pd": "s2", "cq": "s3", "cd": "s3"}
