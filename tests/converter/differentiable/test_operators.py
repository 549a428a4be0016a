"""Every operator computes what onnxruntime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from tests.converter.differentiable.networks import (
    CONV_W,
    X4,
    Y4,
    assert_same,
    one,
    parse,
    random_feeds,
)

CASES: dict[str, tuple[int, str]] = {
    "conv": (17, one("y = Conv(x, w)", f"{X4}, {CONV_W}")),
    "conv bias": (
        17,
        one("y = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w, b)", f"{X4}, {CONV_W}, float[4] b"),
    ),
    "conv asymmetric": (17, one("y = Conv <pads=[0,1,2,3]> (x, w)", f"{X4}, {CONV_W}")),
    "conv same upper": (
        17,
        one('y = Conv <auto_pad="SAME_UPPER", strides=[2,2]> (x, w)', f"{X4}, float[4,3,4,2] w"),
    ),
    "conv same lower": (
        17,
        one('y = Conv <auto_pad="SAME_LOWER"> (x, w)', f"{X4}, float[4,3,4,2] w"),
    ),
    "conv valid": (17, one('y = Conv <auto_pad="VALID"> (x, w)', f"{X4}, {CONV_W}")),
    "conv filters of each channel": (
        13,
        one("y = Conv <group=3, pads=[1,0,2,1]> (x, w, b)", f"{X4}, float[9,1,3,3] w, float[9] b"),
    ),
    "conv groups dilations": (
        17,
        one("y = Conv <group=3, dilations=[2,1]> (x, w)", f"{X4}, float[6,1,3,3] w"),
    ),
    "conv 1d": (
        17,
        one("y = Conv <pads=[1,1]> (x, w)", "float[2,3,9] x, float[4,3,3] w", "float[n,c,l] y"),
    ),
    "conv 3d": (
        17,
        one(
            "y = Conv <strides=[1,2,1]> (x, w)",
            "float[1,2,4,5,6] x, float[3,2,2,2,2] w",
            "float[n,c,d,h,w2] y",
        ),
    ),
    "conv transpose": (
        17,
        one(
            "y = ConvTranspose <strides=[2,3], pads=[1,0,0,2], output_padding=[1,2]> (x, w, b)",
            f"{X4}, float[3,4,3,3] w, float[4] b",
        ),
    ),
    "conv transpose groups": (
        17,
        one(
            "y = ConvTranspose <group=3, dilations=[2,2], strides=[2,2]> (x, w)",
            f"{X4}, float[3,2,3,3] w",
        ),
    ),
    "conv transpose upper": (
        17,
        one(
            'y = ConvTranspose <auto_pad="SAME_UPPER", strides=[2,2]> (x, w)',
            f"{X4}, float[3,4,3,3] w",
        ),
    ),
    "conv transpose lower": (
        17,
        one(
            'y = ConvTranspose <auto_pad="SAME_LOWER", strides=[2,2]> (x, w)',
            f"{X4}, float[3,4,3,3] w",
        ),
    ),
    "conv transpose shape": (
        17,
        one(
            "y = ConvTranspose <output_shape=[14,16], strides=[2,2]> (x, w)",
            f"{X4}, float[3,4,3,3] w",
        ),
    ),
    "gemm": (
        13,
        one(
            "y = Gemm <alpha=0.5, beta=2.0, transA=1, transB=1> (a, b, c)",
            "float[3,2] a, float[4,3] b, float[4] c",
            "float[2,4] y",
        ),
    ),
    "gemm plain": (13, one("y = Gemm (a, b)", "float[2,3] a, float[3,4] b", "float[2,4] y")),
    "matmul": (13, one("y = MatMul (a, b)", "float[2,3,4] a, float[4,5] b", "float[2,3,5] y")),
    "batch normalization": (
        15,
        one(
            "v = Abs (r) y = BatchNormalization <epsilon=0.01> (x, s, b, m, v)",
            f"{X4}, float[3] s, float[3] b, float[3] m, float[3] r",
        ),
    ),
    "instance normalization": (
        17,
        one("y = InstanceNormalization (x, s, b)", f"{X4}, float[3] s, float[3] b"),
    ),
    "layer normalization": (
        17,
        one("y = LayerNormalization <axis=2> (x, s, b)", f"{X4}, float[7,8] s, float[7,8] b"),
    ),
    "group normalization": (
        21,
        one(
            "y = GroupNormalization <num_groups=2, epsilon=0.01> (x, s, b)",
            "float[2,6,4,5] x, float[6] s, float[6] b",
            "float[2,6,4,5] y",
        ),
    ),
    **{
        op: (17, one(f"y = {op} (x)"))
        for op in (
            *("Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Neg", "Abs", "HardSwish", "Softplus"),
            *("GlobalAveragePool", "GlobalMaxPool", "Identity", "Elu", "LeakyRelu", "HardSigmoid"),
            *("Selu", "Celu"),
            *("Ceil", "Cos", "Floor", "Round", "Sign", "Sin", "ReduceL2"),
        )
    },
    "mish": (18, one("y = Mish (x)")),
    "sqrt": (17, one("a = Abs (x) b = Sqrt (a) y = Reciprocal (b)")),
    "log": (17, one("a = Abs (x) b = Add (a, c) y = Log (b)", constants="float c = {0.1}")),
    "norm of axes": (17, one("y = ReduceL2 <axes=[1], keepdims=0> (x)", output="float[n,h,w2] y")),
    "empty ranges": (
        17,
        one(
            "u = Range (five, zero, one) d = Range (zero, five, minus) e = Concat <axis=0> (u, d) "
            "t = Range (a, b, c) f = Cast <to=1> (e) g = Concat <axis=0> (f, t) "
            "s = ReduceSum <keepdims=0> (g) y = Mul (x, s)",
            constants="int64 zero = {0}, int64 five = {5}, int64 one = {1}, int64 minus = {-1}, "
            "float a = {-0.6}, float b = {34.93}, float c = {1.87}",
        ),
    ),
    "tile": (17, one("y = Tile (x, r)", constants="int64[4] r = {1, 2, 1, 3}")),
    "grid of a range": (
        17,
        one(
            "s = Shape (x) h = Gather (s, two) r = Range (zero, h, one) f = Cast <to=1> (r) "
            "t = Range (low, high, step) m = ReduceMax <keepdims=0> (t) "
            "g = Unsqueeze (f, one1) a = Add (x, g) y = Mul (a, m)",
            constants="int64 two = {2}, int64 zero = {0}, int64 one = {1}, int64[1] one1 = {1}, "
            "float low = {0.5}, float high = {2.1}, float step = {0.25}",
        ),
    ),
    **{
        f"where {name}": (
            17,
            one(
                f"a = {test} b = Not (a) c = {join} (a, b) d = Where (c, x, o) e = Where (b, x, o) "
                "y = Add (d, e)",
                f"{X4}, {X4.replace(' x', ' o')}",
            ),
        )
        for name, test, join in (
            ("greater", "Greater (x, o)", "And"),
            ("no less", "GreaterOrEqual (x, o)", "Or"),
            ("less", "Less (x, o)", "Or"),
            ("no greater", "LessOrEqual (x, o)", "And"),
        )
    },
    "leaky relu alpha": (17, one("y = LeakyRelu <alpha=0.3> (x)")),
    "selu constants": (17, one("y = Selu <alpha=1.2, gamma=0.9> (x)")),
    "celu alpha": (17, one("y = Celu <alpha=0.3> (x)")),
    "elu alpha": (17, one("y = Elu <alpha=0.3> (x)")),
    "hard sigmoid alpha": (17, one("y = HardSigmoid <alpha=0.3, beta=0.4> (x)")),
    "prelu": (17, one("y = PRelu (x, s)", f"{X4}, float[3,1,1] s")),
    "gelu": (20, one("y = Gelu (x)")),
    "gelu tanh": (20, one('y = Gelu <approximate="tanh"> (x)')),
    "clip 6": (7, one("y = Clip <min=-0.5, max=0.7> (x)")),
    "clip one side 6": (7, one("y = Clip <max=0.7> (x)")),
    "clip": (17, one("y = Clip (x, a, b)", constants="float a = {-0.5}, float b = {0.7}")),
    "clip high": (17, one('y = Clip (x, "", b)', constants="float b = {0.7}")),
    "clip nothing": (17, one("y = Clip (x)")),
    "softmax 12": (12, one("y = Softmax (x)")),
    "softmax 12 axis": (12, one("y = Softmax <axis=-2> (x)")),
    "softmax 13": (13, one("y = Softmax (x)")),
    "softmax 13 axis": (13, one("y = Softmax <axis=1> (x)")),
    "log softmax 12": (12, one("y = LogSoftmax <axis=2> (x)")),
    "log softmax 13": (13, one("y = LogSoftmax <axis=2> (x)")),
    "lrn": (13, one("y = LRN <size=3, alpha=0.5, beta=0.6, bias=2.0> (x)")),
    "max pool": (12, one("y = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (x)")),
    "max pool asymmetric": (
        12,
        one("y = MaxPool <kernel_shape=[3,2], strides=[2,1], pads=[0,1,2,0]> (x)"),
    ),
    "max pool ceil": (
        12,
        one("y = MaxPool <kernel_shape=[2,3], strides=[2,2], ceil_mode=1> (x)"),
    ),
    "max pool ceil pads": (
        12,
        one(
            "y = MaxPool <kernel_shape=[3,2], strides=[3,3], pads=[1,1,1,1], ceil_mode=1> (x)",
        ),
    ),
    "max pool same upper": (
        12,
        one('y = MaxPool <kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_UPPER"> (x)'),
    ),
    "max pool same lower": (
        12,
        one('y = MaxPool <kernel_shape=[2,2], strides=[2,1], auto_pad="SAME_LOWER"> (x)'),
    ),
    "max pool dilations": (12, one("y = MaxPool <kernel_shape=[2,2], dilations=[3,2]> (x)")),
    "max pool 1d": (
        12,
        one("y = MaxPool <kernel_shape=[3], pads=[1,0]> (x)", "float[2,3,9] x", "float[n,c,l] y"),
    ),
    "max pool 3d": (
        12,
        one("y = MaxPool <kernel_shape=[2,2,2]> (x)", "float[1,2,4,5,6] x", "float[n,c,d,h,w] y"),
    ),
    "average pool": (11, one("y = AveragePool <kernel_shape=[3,2]> (x)")),
    "average pool pads": (
        11,
        one("y = AveragePool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (x)"),
    ),
    "average pool counted": (
        11,
        one("y = AveragePool <kernel_shape=[3,3], pads=[1,0,1,2], count_include_pad=1> (x)"),
    ),
    "average pool same": (
        11,
        one('y = AveragePool <kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_UPPER"> (x)'),
    ),
    **{
        f"average pool ceil {opset} {pads} {counted}": (
            opset,
            one(
                "y = AveragePool <kernel_shape=[3,2], strides=[2,3], ceil_mode=1, "
                f"pads=[{pads}], count_include_pad={counted}> (x)",
                "float[2,3,8,7] x",
            ),
        )
        for opset in (11, 19)
        for pads in ("0,0,0,0", "1,0,1,1")
        for counted in (0, 1)
    },
    **{
        f"{op} broadcast": (13, one(f"y = {op} (x, b)", f"{X4}, float[3,1,1] b"))
        for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
    },
    "max of three": (13, one("y = Max (x, b, c)", f"{X4}, float[3,1,1] b, float[8] c")),
    "mean of three": (13, one("y = Mean (x, b, c)", f"{X4}, float[3,1,1] b, float[8] c")),
    "pow": (13, one("a = Abs (x) y = Pow (a, b)", constants="float b = {1.5}")),
    "pow whole": (13, one("y = Pow (x, b)", constants="int64 b = {2}")),
    "integers": (
        13,
        one(
            "s = Shape (x) m = Neg (s) d = Div (m, t) y = Add (d, t)",
            output="int64[4] y",
            constants="int64[4] t = {2, 2, 3, 3}",
        ),
    ),
    "concat": (13, one("y = Concat <axis=-2> (x, b)", f"{X4}, float[2,3,1,8] b")),
    "flatten": (13, one("y = Flatten (x)", output="float[2,168] y")),
    "flatten axis": (13, one("y = Flatten <axis=-1> (x)", output="float[42,8] y")),
    "flatten all": (13, one("y = Flatten <axis=0> (x)", output="float[1,336] y")),
    "reshape": (13, one("y = Reshape (x, s)", constants="int64[4] s = {0, -1, 4, 2}")),
    "transpose": (13, one("y = Transpose (x)")),
    "transpose perm": (13, one("y = Transpose <perm=[0,2,3,1]> (x)")),
    "squeeze": (
        13,
        one("y = Squeeze (x, a)", "float[2,1,3,1] x", "float[2,3] y", "int64[2] a = {1, -1}"),
    ),
    "squeeze all": (13, one("y = Squeeze (x)", "float[2,1,3,1] x", "float[2,3] y")),
    "squeeze 11": (
        11,
        one("y = Squeeze <axes=[1]> (x)", "float[2,1,3,1] x", "float[2,3,1] y"),
    ),
    "unsqueeze": (
        13,
        one("y = Unsqueeze (x, a)", "float[2,3] x", "float[1,2,1,3] y", "int64[2] a = {2, 0}"),
    ),
    "unsqueeze 11": (
        11,
        one("y = Unsqueeze <axes=[0,2]> (x)", "float[2,3] x", "float[1,2,1,3] y"),
    ),
    "slice 9": (9, one("y = Slice <starts=[1,-3], ends=[9,-1], axes=[1,3]> (x)")),
    "slice": (
        13,
        one(
            "y = Slice (x, s, e, a, t)",
            constants="int64[3] s = {-1, 1, 6}, int64[3] e = {-9223372036854775807, 9, 0}, "
            "int64[3] a = {3, 1, 2}, int64[3] t = {-2, 1, -1}",
        ),
    ),
    "slice backwards from before the start": (
        13,
        one(
            "y = Slice (x, s, e, a, t)",
            constants="int64[1] s = {-100}, int64[1] e = {-200}, int64[1] a = {3}, int64[1] t = {-1}",
        ),
    ),
    "slice empty": (
        13,
        one("y = Slice (x, s, s)", constants="int64[1] s = {1}"),
    ),
    "gather": (
        13,
        one(
            "y = Gather <axis=1> (x, i)",
            output="float[n,a,b,h,w] y",
            constants="int64[2,2] i = {0, -1, 2, 1}",
        ),
    ),
    "gather scalar": (
        13,
        one("y = Gather <axis=-1> (x, i)", output="float[n,c,h] y", constants="int64 i = {3}"),
    ),
    "split 11": (
        11,
        one("y, z = Split <axis=1, split=[1,2]> (x)", output=f"{Y4}, float[n,c2,h,w] z"),
    ),
    "split": (
        13,
        one(
            "y, z = Split <axis=-1> (x, s)",
            output=f"{Y4}, float[n,c,h,w2] z",
            constants="int64[2] s = {3, 5}",
        ),
    ),
    "split equal": (13, one("y, z = Split <axis=3> (x)", output=f"{Y4}, float[n,c,h,w2] z")),
    "split uneven": (
        18,
        one("y, z = Split <axis=2, num_outputs=2> (x)", output=f"{Y4}, float[n,c,h2,w] z"),
    ),
    "shape": (13, one("y = Shape (x)", output="int64[4] y")),
    "shape part": (15, one("y = Shape <start=1, end=-1> (x)", output="int64[2] y")),
    "constant": (
        13,
        one(
            "c = Constant <value_floats=[1.0, 2.0]> () y = Mul (x, c)",
            "float[3,2] x",
            "float[3,2] y",
        ),
    ),
    "constants": (
        13,
        one(
            "a = Constant <value_float=1.5> () b = Constant <value = float[2] {3, 4}> () "
            "s = Constant <value_ints=[2, 3]> () c = Add (a, b) d = Mul (x, c) "
            "y = Reshape (d, s)",
            "float[3,2] x",
            "float[2,3] y",
        ),
    ),
    "constant of shape": (
        13,
        one(
            "s = Shape (x) a = ConstantOfShape <value = float[1] {2.5}> (s) "
            "z = ConstantOfShape (s) b = Add (a, z) y = Add (x, b)",
        ),
    ),
    "expand": (
        13,
        one("y = Expand (x, s)", "float[3,1] x", "float[2,3,4] y", "int64[3] s = {2, 1, 4}"),
    ),
    "pad 10": (10, one("y = Pad <pads=[0,0,1,2,0,0,0,-1], value=1.5> (x)")),
    "pad": (
        13,
        one("y = Pad (x, p, v)", constants="int64[8] p = {0,1,0,2,0,0,3,-1}, float v = {1.5}"),
    ),
    "pad axes": (
        18,
        one('y = Pad (x, p, "", a)', constants="int64[4] p = {0,1,2,3}, int64[2] a = {-1, 1}"),
    ),
    "pad reflect": (
        13,
        one('y = Pad <mode="reflect"> (x, p)', constants="int64[8] p = {0,0,3,1,0,0,2,7}"),
    ),
    "pad edge": (
        13,
        one('y = Pad <mode="edge"> (x, p)', constants="int64[8] p = {0,0,9,1,0,0,0,2}"),
    ),
    "dropout": (13, one("y = Dropout (x)")),
    "dropout 7": (7, one("y, m = Dropout <ratio=0.7> (x)")),
    "cast": (
        13,
        one(
            "a = Cast <to=7> (x) b = Cast <to=9> (x) c = Cast <to=1> (b) d = Cast <to=1> (a) "
            "y = Add (c, d)"
        ),
    ),
    "reduce mean 13": (
        13,
        one("y = ReduceMean <axes=[2,3], keepdims=0> (x)", output="float[n,c] y"),
    ),
    "reduce mean": (18, one("y = ReduceMean (x, a)", constants="int64[2] a = {-1, -2}")),
    "reduce sum": (13, one("y = ReduceSum (x, a)", constants="int64[1] a = {1}")),
    "reduce sum all": (13, one("y = ReduceSum <keepdims=0> (x)", output="float y")),
    "reduce nothing": (13, one("y = ReduceSum <noop_with_empty_axes=1> (x)")),
    "reduce max": (13, one("y = ReduceMax <axes=[1]> (x)")),
    "reduce min": (13, one("y = ReduceMin <axes=[1]> (x)")),
    "where": (
        13,
        one(
            "s = Shape (x) e = Equal (s, t) y = Where (e, a, b)",
            f"{X4}, float[4] a, float[1] b",
            "float[4] y",
            "int64[4] t = {2, 4, 7, 9}",
        ),
    ),
    "depth to space": (13, one("y = DepthToSpace <blocksize=2> (x)", "float[2,8,3,4] x")),
    "depth to space crd": (
        13,
        one('y = DepthToSpace <blocksize=2, mode="CRD"> (x)', "float[2,8,3,4] x"),
    ),
    "space to depth": (13, one("y = SpaceToDepth <blocksize=2> (x)", "float[2,3,4,6] x")),
    "upsample 7": (7, one("y = Upsample <scales=[1.0,1.0,2.0,1.5]> (x)")),
    "upsample 9": (
        9,
        one('y = Upsample <mode="linear"> (x, s)', constants="float[4] s = {1,1,2,3}"),
    ),
    "resize 10": (10, one("y = Resize (x, s)", constants="float[4] s = {1,1,2,3}")),
    "resize sizes": (
        13,
        one('y = Resize <mode="linear"> (x, "", "", s)', constants="int64[4] s = {2,3,5,11}"),
    ),
    "resize axes": (
        18,
        one('y = Resize <axes=[3,2]> (x, "", s)', constants="float[2] s = {2, 0.5}"),
    ),
    **{
        f"resize {mode} {how} {rounding}": (
            13,
            one(
                f'y = Resize <mode="{mode}", coordinate_transformation_mode="{how}", '
                f'nearest_mode="{rounding}"> (x, "", s)',
                constants=f"float[4] s = {{1,1,{scales}}}",
            ),
        )
        for mode, how, rounding, scales in (
            ("nearest", "asymmetric", "floor", "2,2"),
            ("nearest", "asymmetric", "ceil", "1.6,0.6"),
            ("nearest", "asymmetric", "floor", "1.4,1.4"),
            ("nearest", "half_pixel", "round_prefer_floor", "2,0.5"),
            ("nearest", "half_pixel", "round_prefer_ceil", "1.7,0.7"),
            ("nearest", "align_corners", "floor", "2,2"),
            ("linear", "half_pixel", "round_prefer_floor", "2,0.6"),
            ("linear", "pytorch_half_pixel", "round_prefer_floor", "1.7,0.15"),
            ("linear", "align_corners", "round_prefer_floor", "2,0.6"),
            ("linear", "asymmetric", "round_prefer_floor", "2,0.6"),
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_operators_compute_what_onnxruntime_does(case: str) -> None:
    opset, graph = CASES[case]
    model = parse(graph, opset)
    assert_same(model, random_feeds(model))


LIGHT = (
    *("bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50"),
    *("shufflenet", "squeezenet", "vgg19", "zfnet512"),
)


def with_random_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a "light" network weights: its own are all 0.02, and so are all of its answers alike.

    Kernels get normal values that keep the size of what goes through; what is one value for each
    channel (biases, and a batch normalisation's parameters) lies from 0.5 to 1.5. The widest
    classifiers shrink to 64 features.
    """
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(1_000_003, dtype=np.float32)  # repeated: drawing takes longer
    uniform = rng.uniform(0.5, 1.5, 10_007).astype(np.float32)
    shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "ConstantOfShape"]:
        shape = tuple(64 if size == 4096 else int(size) for size in shapes[node.input[0]])
        if len(shape) > 1:
            values = np.resize(normal, shape) * np.float32((2 / np.prod(shape[1:])) ** 0.5)
        else:
            values = np.resize(uniform, shape)
        model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize("name", LIGHT)
def test_large_networks_compute_what_onnxruntime_does(name: str) -> None:
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = with_random_weights(onnx.load(folder / f"light_{name}.onnx"))
    assert_same(model, random_feeds(model), 1e-4)


@pytest.mark.parametrize("name", ["alexnet", "googlenet", "resnet20", "vgg16"])
def test_trained_networks_compute_what_onnxruntime_does(name: str, shared: Path) -> None:
    model = onnx.load(shared / "models" / f"{name}_cifar10.onnx")
    assert_same(model, random_feeds(model, batch=3), 1e-4)
