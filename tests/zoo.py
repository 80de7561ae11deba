"""Small models, one for each topology that coupling must understand; every registered operator is in at least one.

Lengths are different and prime where they can be; a few entries are square on purpose, since equal sizes hide a wrong
tie. Weights and biases are random and never zero, so that nothing cancels by accident.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import onnx
from onnx import numpy_helper, parser

Weights = Mapping[str, "tuple[int, ...] | np.ndarray"]
ZOO: dict[str, Callable[[], onnx.ModelProto]] = {}


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def i8(*shape: int) -> np.ndarray:
    """Seven bits: with eight, pairs of products saturate in some kernels, and which are paired changes with removal."""
    return (np.arange(np.prod(shape)) * 37 % 101 - 50).astype(np.int8).reshape(shape)


def entry(name: str, inputs: str, outputs: str, weights: Weights, body: str, opset: int = 18, ir: int = 8) -> None:
    """A model in ONNX text; a weight is a shape to fill with random numbers, or an array. Variances are positive.

    A weight goes where the text has it: in a Constant of that name, among the initializers of a branch that declares
    it, else among those of the model.
    """

    @cache
    def build() -> onnx.ModelProto:
        domains = (("com.microsoft", 1), ("ai.onnx.ml", 3))
        contrib = "".join(f', "{domain}": {version}' for domain, version in domains if f"{domain}." in body)
        contrib += ', "local": 1' if "local." in body else ""
        header = f'<ir_version: {ir}, opset_import: ["": {opset}{contrib}]>'
        main, _, functions = body.partition("\n---\n")
        model = parser.parse_model(f"{header}\nzoo ({inputs}) => ({outputs}) {{\n{main}\n}}\n{functions}")
        rng = np.random.default_rng(sum(map(ord, name)))
        graphs, constants = bodies(model)
        for key, value in weights.items():
            if not re.search(rf"\b{key}\b", body):  # a loop below offers the same weights to every operator
                continue
            array = value if isinstance(value, np.ndarray) else random(rng, key, value)
            tensor = numpy_helper.from_array(array, key)
            homes = [graph for graph in graphs if any(info.name == key for info in graph.value_info)]
            for constant in constants.get(key, ()):
                constant.attribute[0].CopyFrom(onnx.helper.make_attribute("value", tensor))
            for graph in homes:
                graph.initializer.append(tensor)
            if not homes and key not in constants:
                model.graph.initializer.append(tensor)
        return model

    def copied() -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(build())
        return model

    assert name not in ZOO, name
    ZOO[name] = copied


def bodies(model: onnx.ModelProto) -> tuple[list[onnx.GraphProto], dict[str, list[onnx.NodeProto]]]:
    """The graphs inside nodes, and the Constants of all graphs and functions by name."""
    pending = [model.graph.node, *(function.node for function in model.functions)]
    graphs: list[onnx.GraphProto] = []
    constants: dict[str, list[onnx.NodeProto]] = {}
    while pending:
        for node in pending.pop():
            if node.op_type == "Constant":
                constants.setdefault(node.output[0], []).append(node)
            inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            graphs += inner
            pending += [graph.node for graph in inner]
    return graphs, constants


def random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.startswith("var"):
        return rng.uniform(0.5, 2.0, shape).astype(np.float32)
    fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    return (rng.uniform(0.3, 1.0, shape) * rng.choice([-1, 1], shape) * fan**-0.5).astype(np.float32)


# One operator in the middle of a small perceptron ------------------------------------------------------------------


def unary(
    op: str, before: str = "Identity(h)", attrs: str = "", after: str = "Identity(u)", opset: int = 18, extra: str = ""
) -> None:
    """x -> hidden layer -> op -> output layer; `before` makes its argument legal, `after` makes its result a float."""
    entry(
        f"unary {op}",
        "float[n,3] x",
        "float[n,2] y",
        {
            "w1": (3, 7),
            "b1": (7,),
            "w2": (7, 2),
            "half": np.array(0.5, np.float32),
            "low": np.array(-0.4, np.float32),
            "zero": f32(0),
            "count": i64(3, 5),
        },
        f"h0 = MatMul(x, w1)\nh = Add(h0, b1)\nq = {before}\nu = {op}{attrs}(q{extra})\nv = {after}\ny = MatMul(v, w2)",
        opset,
    )


for op in """Abs Asinh Atan Ceil Celu Cos Cosh Dropout Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu Mish
Neg Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Tan Tanh com.microsoft.FastGelu
com.microsoft.Gelu com.microsoft.QuickGelu""".split():
    unary(op)
for op in ("Acos", "Asin", "Atanh"):
    unary(op, "Sigmoid(h)")
for op in ("Sqrt", "Log", "Reciprocal"):
    unary(op, "Softplus(h)")
unary("Acosh", "Cosh(h)")
unary("ThresholdedRelu", attrs="<alpha = 0.1>")
unary("Gelu", opset=20)
unary("Swish", opset=24)
unary("Clip", extra=", low, half")
unary("Cast", attrs="<to = 7>", after="Cast<to = 1>(u)")
unary("CastLike", extra=", count", after="Cast<to = 1>(u)")
unary("ai.onnx.ml.Binarizer", attrs="<threshold = 0.2>")
unary("IsNaN", "Log(h)", after="Cast<to = 1>(u)", opset=20)
unary("IsInf", "Div(h, zero)", after="Cast<to = 1>(u)", opset=20)
unary("Not", "Greater(h, half)", after="Cast<to = 1>(u)")
unary("BitwiseNot", "Cast<to = 6>(h)", after="Cast<to = 1>(u)")


def binary(
    op: str, before: str = "Identity", after: str = "Identity", attrs: str = "", hidden: str = "Identity"
) -> None:
    """Two hidden layers meet in the operator."""
    entry(
        f"binary {op}",
        "float[n,3] x",
        "float[n,2] y",
        {"w1": (3, 7), "b1": (7,), "w2": (3, 7), "b2": (7,), "w3": (7, 2)},
        f"h0 = MatMul(x, w1)\nh1 = Add(h0, b1)\nh = {hidden}(h1)\ng0 = MatMul(x, w2)\ng1 = Add(g0, b2)\ng = {hidden}(g1)\n"
        f"p = {before}(h)\nq = {before}(g)\nu = {op}{attrs}(p, q)\nv = {after}(u)\n"
        "y = MatMul(v, w3)",
    )


for op in ("Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum", "PRelu"):
    binary(op)
for op in ("Div", "Pow"):
    binary(op, "Exp")
for op in ("And", "Or", "Xor"):
    binary(op, "Cast<to = 9>", "Cast<to = 1>", hidden="Relu")
binary("Equal", "Round", "Cast<to = 1>")
for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
    binary(op, after="Cast<to = 1>")
for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
    binary(op, "Cast<to = 6>", "Cast<to = 1>")
binary("Mod", "Exp", attrs="<fmod = 1>")

entry(
    "broadcast vectors, columns and scalars",
    "float[n,5] x",
    "float[n,3,2] y",
    {"w1": (5, 7), "gain": (7,), "scale": (1,), "one": i64(1), "many": (3, 7), "column": (3, 1), "row": (1, 1, 7),
     "w2": (7, 2)},
    "h = MatMul(x, w1)\na = Mul(gain, h)\nb = Mul(a, scale)\nc = Unsqueeze(b, one)\nd = Add(c, many)\ne = Mul(column, d)\n"
    "f = Greater(e, row)\ng = Where(f, e, row)\ny = MatMul(g, w2)",
)  # fmt: skip

# Convolutions ------------------------------------------------------------------------------------------------------

entry(
    "residual CNN",
    "float[n,3,6,5] x",
    "float[n,2] y",
    {"w0": (7, 3, 3, 3), "b0": (7,), "g1": (7,), "s1": (7,), "m1": (7,), "var1": (7,), "w1": (11, 7, 1, 1),
     "g2": (11,), "s2": (11,), "m2": (11,), "var2": (11,), "w2": (7, 11, 3, 3), "w3": (2, 7), "b3": (2,)},
    "a = Conv<pads = [1,1,1,1]>(x, w0, b0)\nb = BatchNormalization(a, g1, s1, m1, var1)\nc = Relu(b)\nd = Conv(c, w1)\n"
    "e = BatchNormalization(d, g2, s2, m2, var2)\nf = Relu(e)\ng = Conv<pads = [1,1,1,1]>(f, w2)\nh = Add(c, g)\n"
    "i = GlobalAveragePool(h)\nj = Flatten(i)\ny = Gemm<transB = 1>(j, w3, b3)",
)  # fmt: skip
entry(
    "grouped and depthwise",
    "float[n,4,6,5] x",
    "float[n,2,6,5] y",
    {"w0": (12, 4, 1, 1), "b0": (12,), "w1": (15, 4, 3, 3), "b1": (15,), "w2": (15, 1, 3, 3), "w3": (30, 1, 1, 1),
     "b3": (30,), "w4": (2, 30, 1, 1)},
    "a = Conv(x, w0, b0)\nb = Conv<group = 3, pads = [1,1,1,1]>(a, w1, b1)\nc = Relu(b)\n"
    "d = Conv<group = 15, pads = [1,1,1,1]>(c, w2)\ne = Conv<group = 15>(d, w3, b3)\ny = Conv(e, w4)",
)  # fmt: skip
entry(
    "one and three dimensions",
    "float[n,3,11] x, float[n,2,4,3,5] z",
    "float[n,2,9] y, float[n,3,4,3,5] t",
    {"w0": (7, 3, 3), "b0": (7,), "w1": (2, 7, 1), "v0": (5, 2, 3, 1, 1), "v1": (3, 5, 1, 1, 1)},
    "a = Conv(x, w0, b0)\nb = Tanh(a)\ny = Conv(b, w1)\nc = Conv<pads = [1,0,0,1,0,0]>(z, v0)\nd = Sigmoid(c)\nt = Conv(d, v1)",
)
entry(
    "transposed convolutions",
    "float[n,3,4,5] x",
    "float[n,2,8,10] y",
    {
        "w0": (3, 7, 2, 2),
        "b0": (7,),
        "w1": (6, 7, 1, 1),
        "b1": (6,),
        "w2": (6, 5, 1, 1),
        "b2": (10,),
        "w3": (10, 2, 1, 1),
    },
    "a = ConvTranspose<strides = [2,2]>(x, w0, b0)\nb = Relu(a)\nc = Conv(b, w1, b1)\n"
    "d = ConvTranspose<group = 2>(c, w2, b2)\ny = ConvTranspose(d, w3)",
)
entry(
    "channel shuffle",
    "float[n,3,2,2] x",
    "float[n,2,2,2] y",
    {"w0": (12, 3, 1, 1), "b0": (12,), "w1": (12, 4, 1, 1), "b1": (12,), "w2": (12, 4, 1, 1), "w3": (2, 12, 1, 1),
     "s1": i64(-1, 3, 4, 2, 2), "s2": i64(0, 12, 2, 2)},
    "a = Conv(x, w0, b0)\nb = Conv<group = 3>(a, w1, b1)\nc = Relu(b)\nd = Reshape(c, s1)\ne = Transpose<perm = [0,2,1,3,4]>(d)\n"
    "f = Reshape(e, s2)\ng = Conv<group = 3>(f, w2)\ny = Conv(g, w3)",
)  # fmt: skip
entry(
    "dense block, one piece twice",
    "float[n,3,4,4] x",
    "float[n,2] y",
    {"w0": (5, 3, 1, 1), "w1": (7, 5, 3, 3), "w2": (3, 12, 1, 1), "w3": (2, 22), "b3": (2,), "g": (15,), "s": (15,),
     "m": (15,), "var": (15,)},
    "a = Conv(x, w0)\nb = Conv<pads = [1,1,1,1]>(a, w1)\nc = Concat<axis = 1>(a, b)\nd = Conv(c, w2)\n"
    "e = Concat<axis = 1>(c, d)\nf = BatchNormalization(e, g, s, m, var)\nh = Concat<axis = -3>(f, b)\n"
    "i = GlobalMaxPool(h)\nj = Squeeze(i)\ny = Gemm<transB = 1, alpha = 0.5>(j, w3, b3)",
)  # fmt: skip
entry(
    "tokens go to experts by where the gate is open, and are added back",
    "float[n,6] x",
    "float[n,2] y",
    {"wg": (6, 3), "t0": i64(0), "t1": i64(1),
     **{f"w{e}{k}": shape for e in range(3) for k, shape in enumerate(((6, 7 + 4 * e), (7 + 4 * e, 6)))},
     **{f"e{e}": np.array(e) for e in range(3)}, "w2": (6, 5), "w3": (5, 2), "low": f32(0.0)},
    "g = MatMul(x, wg)\nprobs = Softmax<axis = -1>(g)\nxs = Shape(x)\nz0 = ConstantOfShape(xs)\n"
    + "".join(
        f"p{e} = Gather<axis = 1>(probs, e{e})\nq{e} = Gather<axis = 1>(g, e{e})\nm{e} = Greater(q{e}, low)\n"
        f"i{e} = NonZero(m{e})\nr{e} = Squeeze(i{e}, t0)\nh{e} = Gather<axis = 0>(x, r{e})\n"
        f"u{e} = MatMul(h{e}, w{e}0)\nv{e} = Relu(u{e})\no{e} = MatMul(v{e}, w{e}1)\n"
        f"a{e} = Gather<axis = 0>(p{e}, r{e})\nb{e} = Unsqueeze(a{e}, t1)\ns{e} = Mul(o{e}, b{e})\n"
        f"j{e} = Unsqueeze(r{e}, t1)\nd{e} = ScatterND(z0, j{e}, s{e})\n"
        for e in range(3)
    )
    + "y0 = Sum(d0, d1, d2)\ny1 = Add(y0, x)\ny2 = MatMul(y1, w2)\ny3 = Relu(y2)\ny = MatMul(y3, w3)",
)  # fmt: skip
entry(
    "what a flag keeps, of any number",
    "float[n,6] x, bool[n] kept",
    "float[u,2] y",
    {"w0": (6, 5), "w1": (5, 2)},
    "a = MatMul(x, w0)\nb = Relu(a)\nc = Compress<axis = 0>(b, kept)\ny = MatMul(c, w1)",
)
entry(
    "a batch of one is squeezed away",
    "float[n,3,1,1] x",
    "float[n,2] y",
    {"w0": (5, 3, 1, 1), "w1": (5, 7), "w2": (7, 2)},
    "a = Conv(x, w0)\nb = Squeeze(a)\nc = MatMul(b, w1)\nd = Relu(c)\ny = MatMul(d, w2)",
)
entry(
    "inception with pools",
    "float[n,3,8,8] x",
    "float[n,2] y",
    {"w0": (5, 3, 3, 3), "w1": (7, 5, 1, 1), "w2": (2, 17, 1, 1), "w3": (11, 3, 2, 2)},
    "a = Conv<pads = [1,1,1,1]>(x, w0)\nb = MaxPool<kernel_shape = [2,2], strides = [2,2]>(a)\n"
    "c = AveragePool<kernel_shape = [2,2], strides = [2,2]>(a)\nd = LpPool<kernel_shape = [2,2], strides = [2,2], p = 2>(a)\n"
    "e = Conv(b, w1)\nf = Add(c, d)\ng = Concat<axis = 1>(e, f, f)\nh = Conv(g, w2)\ni = GlobalLpPool<p = 2>(h)\ny = Flatten(i)",
)
entry(
    "split, transform, merge",
    "float[n,3,4,4] x",
    "float[n,2,4,4] y",
    {"w0": (12, 3, 1, 1), "sizes": i64(5, 7), "w1": (7, 7, 3, 3), "w2": (2, 12, 1, 1), "lo": i64(2), "hi": i64(2**62),
     "axis": i64(1), "w3": (2, 10, 1, 1), "order": i64(3, 1, 0, 2, 4, 9, 8, 7, 6, 5)},
    "a = Conv(x, w0)\nb, c = Split<axis = 1>(a, sizes)\nd = Conv<pads = [1,1,1,1]>(c, w1)\ne = Concat<axis = 1>(b, d)\n"
    "f = Conv(e, w2)\ng = Slice(e, lo, hi, axis)\nh = Gather<axis = 1>(g, order)\ni = Conv(h, w3)\ny = Add(f, i)",
)  # fmt: skip
entry(
    "squeeze and excite",
    "float[n,3,5,4] x",
    "float[n,2,5,4] y",
    {
        "w0": (7, 3, 3, 3),
        "w1": (3, 7, 1, 1),
        "b1": (3,),
        "w2": (7, 3, 1, 1),
        "b2": (7,),
        "w3": (2, 7, 1, 1),
        "hw": i64(2, 3),
    },
    "a = Conv<pads = [1,1,1,1]>(x, w0)\nb = ReduceMean<keepdims = 1>(a, hw)\nc = Conv(b, w1, b1)\nd = HardSwish(c)\n"
    "e = Conv(d, w2, b2)\nf = HardSigmoid(e)\ng = Mul(a, f)\ny = Conv(g, w3)",
)
entry(
    "U-Net with scales",
    "float[n,3,8,8] x",
    "float[n,2,8,8] y",
    {"w0": (5, 3, 3, 3), "w1": (7, 5, 3, 3), "w2": (5, 7, 1, 1), "w3": (2, 10, 1, 1), "scales": f32(1, 1, 2, 2),
     "border": i64(0, 0, 1, 0, 0, 0, 1, 0), "w4": (2, 5, 3, 1)},
    'a = Conv<pads = [1,1,1,1]>(x, w0)\nb = MaxPool<kernel_shape = [2,2], strides = [2,2]>(a)\nc = Conv<pads = [1,1,1,1]>(b, w1)\n'
    'd = Conv(c, w2)\ne = Resize<mode = "nearest">(d, , scales)\nf = Concat<axis = 1>(e, a)\ng = Conv(f, w3)\n'
    "h = Pad(e, border)\ni = Conv(h, w4)\ny = Add(g, i)",
)  # fmt: skip
entry(
    "U-Net at any size",
    "float[n,3,h,w] x",
    "float[n,2,h,w] y",
    {"w0": (5, 3, 3, 3), "w1": (7, 5, 3, 3), "w2": (7, 5, 2, 2), "w3": (2, 10, 1, 1), "zero": i64(0), "zeros": i64(0, 0),
     "two": i64(2), "three": i64(3), "four": i64(4), "six": i64(0, 0, 0, 0, 0, 0)},
    "a = Conv<pads = [1,1,1,1]>(x, w0)\nb = MaxPool<kernel_shape = [2,2], strides = [2,2]>(a)\nc = Conv<pads = [1,1,1,1]>(b, w1)\n"
    "d = ConvTranspose<strides = [2,2]>(c, w2)\nr = Shape(a)\nq = Shape(d)\ngap = Sub(r, q)\nhw = Slice(gap, two, four, zero)\n"
    "pads = Concat<axis = 0>(six, hw)\ne = Pad(d, pads)\nf = Concat<axis = 1>(a, e)\ny = Conv(f, w3)",
)  # fmt: skip
entry(
    "resized to computed sizes",
    "float[n,3,h,w] x",
    "float[n,2,h2,w2] y",
    {"w0": (7, 3, 1, 1), "w1": (2, 7, 1, 1), "zero": i64(0), "two": i64(2), "four": i64(4), "double": i64(2, 2)},
    'a = Conv(x, w0)\ns = Shape(a)\nnc = Slice(s, zero, two)\nhw = Slice(s, two, four)\nbig = Mul(hw, double)\n'
    'sizes = Concat<axis = 0>(nc, big)\nb = Resize<mode = "linear", coordinate_transformation_mode = "asymmetric">(a, , , sizes)\n'
    "y = Conv(b, w1)",
)  # fmt: skip
entry(
    "flattened map",
    "float[n,3,4,5] x",
    "float[n,2] y",
    {"w0": (7, 3, 3, 3), "b0": (7,), "w1": (2, 140), "w2": (140, 2), "to": i64(-1, 140)},
    "a = Conv<pads = [1,1,1,1]>(x, w0, b0)\nb = Flatten(a)\nc = Gemm<transB = 1>(b, w1)\nd = Transpose<perm = [0,2,3,1]>(a)\n"
    "e = Reshape(d, to)\nf = MatMul(e, w2)\ny = Add(c, f)",
)
entry(
    "channels last",
    "float[n,4,5,3] x",
    "float[n,4,5,2] y",
    {"w0": (7, 3, 1, 1), "w1": (7, 11), "b1": (11,), "w2": (11, 2), "one": f32(1)},
    "a = Transpose<perm = [0,3,1,2]>(x)\nb = Conv(a, w0)\nc = Transpose<perm = [0,2,3,1]>(b)\nd = MatMul(c, w1)\ne = Add(d, b1)\n"
    "f = Mul(e, one)\ny = MatMul(f, w2)",
)
entry(
    "constant border on the channels",
    "float[n,3,4,4] x",
    "float[n,2,4,4] y",
    {"w0": (5, 3, 1, 1), "w1": (9, 3, 1, 1), "border": i64(0, 1, 0, 0, 0, 3, 0, 0), "w2": (2, 9, 1, 1)},
    "a = Conv(x, w0)\nb = Pad(a, border)\nc = Conv(x, w1)\nd = Add(b, c)\ny = Conv(d, w2)",
)
entry(
    "old opset",
    "float[n,3,4,4] x",
    "float[n,2,9,9] y",
    {"w0": (7, 3, 3, 3), "w1": (2, 7, 1, 1), "scales": f32(1, 1, 2, 2)},
    'a = Conv<pads = [1,1,1,1]>(x, w0)\nb = Clip<min = -0.5, max = 0.5>(a)\nc = Upsample<mode = "nearest">(b, scales)\n'
    "d = Slice<axes = [2], starts = [0], ends = [7]>(c)\ne = Pad<pads = [0,0,1,1,0,0,1,0]>(d)\nf = Dropout(e)\ny = Conv(f, w1)",
    opset=9,
)
entry(
    "weight through Identity, Transpose, Cast and Reshape",
    "float[n,3] x",
    "float[n,2] y",
    {"w0": (7, 3), "w1": np.linspace(-1, 1, 77).reshape(7, 11).astype(np.float16), "w2": (22,), "to": i64(11, 2),
     "ends": i64(2**31), "b1": (11,), "minus": i64(-1), "start": i64(-1), "low": i64(-(2**62)), "zero": i64(0)},
    "a = Identity(w0)\nb = Transpose(a)\nh = MatMul(x, b)\nc = Cast<to = 1>(w1)\ni = Gemm(h, c, b1)\nd = Reshape(w2, to)\n"
    "e = Slice(d, start, low, zero, minus)\ny = MatMul(i, e)",
)  # fmt: skip

# Normalisations, reductions, softmax -------------------------------------------------------------------------------

entry(
    "norms",
    "float[n,3,5,4] x",
    "float[n,2,5,4] y",
    {"w0": (7, 3, 1, 1), "g0": (7,), "s0": (7,), "w1": (6, 7, 1, 1), "g1": (6,), "s1": (6,), "w2": (2, 6, 1, 1),
     "g2": (4,), "s2": (4,)},
    "a = Conv(x, w0)\nb = InstanceNormalization(a, g0, s0)\nc = Conv(b, w1)\nd = LayerNormalization<axis = -1>(c, g2, s2)\n"
    "e = LpNormalization<axis = 2>(d)\ny = Conv(e, w2)",
)  # fmt: skip
entry(
    "width under LayerNorm and softmax over channels",
    "float[n,5,3] x",
    "float[n,5,2] y",
    {"w0": (3, 8), "b0": (8,), "g": (8,), "s": (8,), "w1": (8, 11), "b1": (11,), "w2": (11, 8), "w3": (8, 2)},
    "a = MatMul(x, w0)\nb = Add(a, b0)\nc = LayerNormalization(b, g, s)\nd = MatMul(c, w1)\ne = Add(d, b1)\nf = Relu(e)\n"
    "h = MatMul(f, w2)\ni = Add(b, h)\nj = Softmax(i)\ny = MatMul(j, w3)",
)
entry(
    "other softmaxes",
    "float[n,5,3] x",
    "float[n,5,2] y",
    {"w0": (3, 8), "w1": (8, 2), "w2": (8, 2)},
    "a = MatMul(x, w0)\nb = LogSoftmax<axis = 1>(a)\nc = Hardmax<axis = 1>(a)\nd = MatMul(b, w1)\ne = MatMul(c, w2)\ny = Add(d, e)",
)
entry(
    "RMSNorm",
    "float[n,5,3] x",
    "float[n,5,2] y",
    {"w0": (3, 8), "g0": (8,), "g1": (8,), "w1": (8, 7), "w2": (7, 8), "w3": (8, 2)},
    "a = MatMul(x, w0)\nb = RMSNormalization(a, g0)\nc = MatMul(b, w1)\nd = Sigmoid(c)\ne = MatMul(d, w2)\n"
    "f = SimplifiedLayerNormalization<axis = -1>(e, g1)\ny = MatMul(f, w3)",
    opset=23,
)
entry(
    "old softmax and ArgMax",
    "float[n,3] x",
    "float[n,2] y, int64[n,1] best",
    {"w0": (3, 7), "w1": (7, 11), "w2": (11, 2)},
    "a = MatMul(x, w0)\nb = Softmax(a)\nc = MatMul(a, w1)\nd = Relu(c)\ne = MatMul(b, w1)\nf = Add(d, e)\ny = MatMul(f, w2)\n"
    "best = ArgMax<axis = 1>(d)",
    opset=12,
)
for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split():
    entry(
        f"reduce {kind}",
        "float[n,3,4,5] x",
        "float[n,2] y",
        {"w0": (7, 3, 1, 1), "b0": (7,), "w1": (7, 2), "hw": i64(-1, 2), "w2": (7, 2)},
        f"a = Conv(x, w0, b0)\nb = Softplus(a)\nc = Reduce{kind}<keepdims = 0>(b, hw)\nd = MatMul(c, w1)\n"
        f"e = ArgMin<axis = 3>(a)\nf = Cast<to = 1>(e)\ng = ReduceMean(f, hw)\nh = Flatten(g)\ni = MatMul(h, w2)\ny = Add(d, i)",
    )

entry(
    "norms spelt out",
    "float[n,5,3] x",
    "float[n,5,2] y",
    {"w0": (3, 8), "b0": (8,), "last": i64(-1), "two": f32(2), "eps": f32(1e-5), "g": (8,), "s": (8,), "w1": (8, 11), "w2": (11, 2),
     "h": (11,), "k": (11,)},
    "a0 = MatMul(x, w0)\na = Add(a0, b0)\nm = ReduceMean(a, last)\nc = Sub(a, m)\nq = Pow(c, two)\nv = ReduceMean(q, last)\n"
    "e = Add(v, eps)\nd = Sqrt(e)\nf = Div(c, d)\ni = Mul(g, f)\nj = Add(i, s)\nl = MatMul(j, w1)\no = Mul(l, l)\n"
    "p = ReduceMean(o, last)\nr = Add(p, eps)\nt = Sqrt(r)\nu = Reciprocal(t)\nz = Mul(l, u)\nb = Mul(h, z)\nbb = Add(b, k)\ny = MatMul(bb, w2)",
)  # fmt: skip
entry(
    "softmax, L2 norm and means spelt out",
    "float[n,5,3] x",
    "float[n,5,2] y",
    {"w0": (3, 8), "b0": (8,), "last": i64(-1), "eps": f32(1e-6), "w1": (8, 7), "w2": (7, 2), "w3": (8, 2), "gain": (8,)},
    "a0 = MatMul(x, w0)\na = Add(a0, b0)\nm = ReduceMax(a, last)\nc = Sub(a, m)\ne = Exp(c)\ns = ReduceSum(e, last)\np = Div(e, s)\n"
    "b = MatMul(p, w1)\nn2 = ReduceL2(b, last)\nn3 = Max(n2, eps)\nd = Div(b, n3)\nt = MatMul(d, w2)\nq = ReduceLogSumExp(a, last)\n"
    "r = Sub(a, q)\nu = MatMul(r, w3)\ny0 = Add(t, u)\ng = Mul(a, gain)\nh = ReduceMin(g, last)\ny = Add(y0, h)",
)  # fmt: skip
entry(
    "norm over channels and space",
    "float[n,3,5,4] x",
    "float[n,2,5,4] y",
    {"w0": (7, 3, 1, 1), "g": (7, 5, 4), "s": (7, 5, 4), "w1": (2, 7, 1, 1), "one": i64(1), "w2": (7, 7, 1, 1)},
    "a = Conv(x, w0)\nb = LayerNormalization<axis = 1>(a, g, s)\nc = ReduceMean(b, one)\nd = ReduceMax(b, one)\ne = Sub(d, c)\n"
    "f = Conv(b, w2)\nh = Mul(f, e)\ny = Conv(h, w1)",
)  # fmt: skip

# Attention ---------------------------------------------------------------------------------------------------------

ATTENTION = """q1 = Reshape(q0, split)
k1 = Reshape(k0, split)
v1 = Reshape(v0, split)
q = Transpose<perm = [0,2,1,3]>(q1)
k = Transpose<perm = [0,2,3,1]>(k1)
v = Transpose<perm = [0,2,1,3]>(v1)
s0 = MatMul(q, k)
s1 = Mul(s0, scale)
p = Softmax(s1)
o0 = MatMul(p, v)
o1 = Transpose<perm = [0,2,1,3]>(o0)
o = Reshape(o1, join)
y = MatMul(o, wo)"""
entry(
    "heads, three projections",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {"wq": (6, 15), "bq": (15,), "wk": (6, 15), "wv": (6, 15), "bv": (15,), "wo": (15, 2), "split": i64(0, 0, 3, 5),
     "join": i64(0, 0, 15), "scale": f32(0.4)},
    f"q2 = MatMul(x, wq)\nq0 = Add(q2, bq)\nk0 = MatMul(x, wk)\nv2 = MatMul(x, wv)\nv0 = Add(v2, bv)\n{ATTENTION}",
)  # fmt: skip
entry(
    "heads, one packed projection, square",
    "float[n,4,4] x",
    "float[n,4,4] y",
    {"w": (4, 48), "b": (48,), "wo": (16, 4), "split": i64(0, 0, 4, 4), "join": i64(0, 0, -1), "scale": f32(0.5)},
    f"a = MatMul(x, w)\nc = Add(a, b)\nq0, k0, v0 = Split<axis = 2, num_outputs = 3>(c)\n{ATTENTION}",
)
entry(
    "heads, packed with the three in front",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {"w": (6, 45), "b": (45,), "wo": (15, 2), "five": i64(0, 0, 3, 3, 5), "join": i64(0, 0, 15), "i0": np.array(0),
     "i1": np.array(1), "i2": np.array(2)},
    "a = MatMul(x, w)\nc = Add(a, b)\nd = Reshape(c, five)\ne = Transpose<perm = [2,0,3,1,4]>(d)\nq = Gather<axis = 0>(e, i0)\n"
    "k = Gather<axis = 0>(e, i1)\nv = Gather<axis = 0>(e, i2)\nkt = Transpose<perm = [0,1,3,2]>(k)\ns = MatMul(q, kt)\np = Softmax(s)\n"
    "o0 = MatMul(p, v)\no1 = Transpose<perm = [0,2,1,3]>(o0)\no = Reshape(o1, join)\ny = MatMul(o, wo)",
)  # fmt: skip
entry(
    "heads folded into the batch",
    "float[5,2,6] x",
    "float[5,2,6] y",
    {"wq": (6, 12), "bq": (12,), "wk": (6, 12), "wv": (6, 12), "bv": (12,), "wo": (12, 6), "split": i64(5, 6, 4),
     "join": i64(5, 2, 12)},
    "q2 = MatMul(x, wq)\nq0 = Add(q2, bq)\nk0 = MatMul(x, wk)\nv2 = MatMul(x, wv)\nv0 = Add(v2, bv)\nq1 = Reshape(q0, split)\n"
    "q = Transpose<perm = [1,0,2]>(q1)\nk1 = Reshape(k0, split)\nk = Transpose<perm = [1,2,0]>(k1)\nv1 = Reshape(v0, split)\n"
    "v = Transpose<perm = [1,0,2]>(v1)\ns = MatMul(q, k)\np = Softmax(s)\no0 = MatMul(p, v)\no1 = Transpose<perm = [1,0,2]>(o0)\n"
    "o = Reshape(o1, join)\ny = MatMul(o, wo)",
)  # fmt: skip
entry(
    "grouped convolutions around heads",
    "float[n,6,t] x",
    "float[n,6,t] y",
    {"wq": (12, 2, 1), "wk": (12, 2, 1), "wv": (15, 2, 1), "wo": (6, 5, 1), "w1": (21, 2, 1), "w2": (6, 7, 1),
     "four": i64(0, 3, 4, -1), "five": i64(0, 3, 5, -1), "join": i64(0, 15, -1)},
    "q0 = Conv<group = 3>(x, wq)\nk0 = Conv<group = 3>(x, wk)\nv0 = Conv<group = 3>(x, wv)\nq1 = Reshape(q0, four)\n"
    "k = Reshape(k0, four)\nv = Reshape(v0, five)\nq = Transpose<perm = [0,1,3,2]>(q1)\ns = MatMul(q, k)\np = Softmax(s)\n"
    "pt = Transpose<perm = [0,1,3,2]>(p)\no0 = MatMul(v, pt)\no = Reshape(o0, join)\na = Conv<group = 3>(o, wo)\n"
    "b = Conv<group = 3>(a, w1)\nc = Relu(b)\ny = Conv<group = 3>(c, w2)",
)  # fmt: skip
entry(
    "grouped queries, rotary, computed sizes",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {"wq": (6, 24), "wk": (6, 12), "wv": (6, 12), "wo": (24, 2), "zero": i64(0), "one": i64(1), "two": i64(2), "six": i64(6),
     "four": i64(4), "minus": i64(-1), "i0": np.array(0), "i1": np.array(1), "far": i64(2**62), "cos": (1, 1, 1, 4),
     "sin": (1, 1, 1, 4), "three": i64(3), "half": i64(2), "all": i64(24)},
    "s = Shape(x)\nn0 = Gather(s, i0)\nt0 = Gather(s, i1)\nn = Unsqueeze(n0, zero)\nt = Unsqueeze(t0, zero)\n"
    "qs = Concat<axis = 0>(n, t, six, four)\nks = Concat<axis = 0>(n, t, three, four)\nq0 = MatMul(x, wq)\nk0 = MatMul(x, wk)\n"
    "v0 = MatMul(x, wv)\nq1 = Reshape(q0, qs)\nk1 = Reshape(k0, ks)\nv1 = Reshape(v0, ks)\nq2 = Transpose<perm = [0,2,1,3]>(q1)\n"
    "k2 = Transpose<perm = [0,2,1,3]>(k1)\nv2 = Transpose<perm = [0,2,1,3]>(v1)\nqc = Mul(q2, cos)\n"
    "qa = Slice(q2, zero, half, three)\nqb = Slice(q2, half, far, three)\nqn = Neg(qb)\nqr = Concat<axis = -1>(qn, qa)\n"
    "qd = Mul(qr, sin)\nq = Add(qc, qd)\nk3 = Unsqueeze(k2, two)\nes = Concat<axis = 0>(n, three, two, t, four)\n"
    "k4 = Expand(k3, es)\ngs = Concat<axis = 0>(n, six, t, four)\nk5 = Reshape(k4, gs)\nv3 = Unsqueeze(v2, two)\nv4 = Expand(v3, es)\n"
    "v5 = Reshape(v4, gs)\nk = Transpose<perm = [0,1,3,2]>(k5)\na = MatMul(q, k)\np = Softmax(a)\no0 = MatMul(p, v5)\n"
    "o1 = Transpose<perm = [0,2,1,3]>(o0)\njs = Concat<axis = 0>(n, t, all)\no = Reshape(o1, js)\ny = MatMul(o, wo)",
)  # fmt: skip
entry(
    "tied embedding and positions",
    "int64[n,t] ids",
    "float[n,t,13] y",
    {"table": (13, 7), "places": (32, 7), "w1": (7, 11), "w2": (11, 7), "i1": np.array(1), "i0": np.array(0), "one": np.array(1),
     "lots": (400, 7)},
    "a = Gather(table, ids)\ns = Shape(ids)\nt = Gather(s, i1)\nr = Range(i0, t, one)\nb = Gather(places, r)\nc = Add(a, b)\n"
    "d = MatMul(c, w1)\ne = Relu(d)\nf = MatMul(e, w2)\ng = Add(c, f)\nk = Transpose<perm = [1,0]>(table)\ny = MatMul(g, k)",
)  # fmt: skip

# Storage and form --------------------------------------------------------------------------------------------------

entry(
    "one zero for many layers",
    "float[n,3] x",
    "float[n,2] y",
    {"w1": (3, 7), "w2": (7, 7), "w3": (7, 2), "b": (7,), "out": (2,)},
    "a = Gemm(x, w1, b)\nc = Relu(a)\nd = Gemm(c, w2, b)\ne = Relu(d)\ny = Gemm(e, w3, out)",
)
entry(
    "one layer applied twice",
    "float[n,40] x",
    "float[n,2] y",
    {"w1": (40, 40), "b1": (40,), "w2": (40, 40), "b2": (40,), "w3": (40, 2)},
    "a = Gemm(x, w1, b1)\nb = Relu(a)\nc = Gemm(b, w2, b2)\nd = Relu(c)\ne = Gemm(d, w2, b2)\nf = Relu(e)\ny = MatMul(f, w3)",
)
entry(
    "a length that is called dynamic and is written down",
    "float[n,t,3] x",
    "float[n,t,2] y",
    {"places": (6, 3), "w1": (3, 7), "b1": (7,), "w2": (7, 2), "last": np.array(5), "one": i64(1)},
    "a = Add(x, places)\nb = MatMul(a, w1)\nc = Add(b, b1)\nd = Gather<axis = 1>(c, last)\ne = Unsqueeze(d, one)\nf = Mul(c, e)\n"
    "y = MatMul(f, w2)",
)
entry(
    "sizes of every kind",
    "float[n,3] x",
    "float[n,2] y",
    {"w1": (3, 7), "w2": (7, 2), "one": i64(1), "none": np.zeros(0, np.int64)},
    "a = MatMul(x, w1)\nsize = Size(a)\nb = Cast<to = 1>(size)\nc = Softsign(b)\nd = Mul(a, c)\nshape = Shape(a)\n"
    "e = ConstantOfShape<value = float[1] {0.5}>(shape)\nf = Add(d, e)\ny = MatMul(f, w2)",
)
entry(
    "quantised weights and activations",
    "float[n,3,4,4] x",
    "float[n,2,4,4] y",
    {"w0": (7, 3, 3, 3), "q1": np.arange(-38, 39, dtype=np.int8).reshape(11, 7, 1, 1), "scale1": np.full(11, 0.02, np.float32),
     "zero1": np.zeros(11, np.int8), "s": np.array(0.05, np.float32), "z": np.array(128, np.uint8), "w2": (2, 11, 1, 1),
     "bias": np.arange(-5, 6, dtype=np.int32), "bias_scale": np.full(11, 0.01, np.float32), "bias_zero": np.zeros(11, np.int32)},
    "a = Conv<pads = [1,1,1,1]>(x, w0)\nb = QuantizeLinear(a, s, z)\nc = DequantizeLinear(b, s, z)\n"
    "w1 = DequantizeLinear<axis = 0>(q1, scale1, zero1)\nb1 = DequantizeLinear<axis = 0>(bias, bias_scale, bias_zero)\n"
    "d = Conv(c, w1, b1)\ne = Relu(d)\ny = Conv(e, w2)",
)  # fmt: skip
for name, node, channels in (
    ("DepthToSpace", "DepthToSpace<blocksize = 2>(b)", 2),
    ("DepthToSpace in columns", 'DepthToSpace<blocksize = 2, mode = "CRD">(b)', 2),
    ("SpaceToDepth", "SpaceToDepth<blocksize = 2>(b)", 32),
    ("LRN", "LRN<size = 3>(b)", 8),
    ("Tile", "Tile(b, twice)", 16),
    ("Trilu", "Trilu(b)", 8),
    ("CumSum", "CumSum(b, axis)", 8),
    ("CumSum over space", "CumSum(b, last)", 8),
    ("GroupNormalization", "GroupNormalization<num_groups = 2>(b, g, s)", 8),
):
    entry(
        f"convolutions around {name}",
        "float[n,3,4,4] x",
        "float[n,2,h,w] y",
        {"w0": (7, 3, 1, 1), "w1": (8, 7, 1, 1), "b1": (8,), "g": (8,), "s": (8,), "twice": i64(1, 2, 2, 1), "axis": np.array(1), "last": np.array(-1),
         "w2": (2, channels, 1, 1)},
        f"a0 = Conv(x, w0)\na = Relu(a0)\nb = Conv(a, w1, b1)\nc = {node}\ny = Conv(c, w2)",
        opset=21,
    )  # fmt: skip
entry(
    "GroupNorm as InstanceNorm",
    "float[n,3,h,w] x",
    "float[n,2,h,w] y",
    {"w0": (12, 3, 1, 1), "to": i64(0, 3, -1), "ones": (3,), "zeros": (3,), "gain": (12, 1, 1), "shift": (12, 1, 1),
     "w1": (2, 12, 1, 1)},
    "a = Conv(x, w0)\nb = Reshape(a, to)\nc = InstanceNormalization(b, ones, zeros)\ns = Shape(a)\nd = Reshape(c, s)\n"
    "e = Mul(d, gain)\nf = Add(e, shift)\ny = Conv(f, w1)",
)  # fmt: skip
entry(
    "positions by number",
    "float[n,5,3] x, int64[n,2] which",
    "float[n,2,2] y, float[n,5,2] z, int64[n,5,1] best",
    {"w1": (3, 7), "b1": (7,), "w2": (7, 2), "w3": (7, 2), "axes": i64(2), "many": i64(1, 1, 7), "k": i64(1), "start": i64(0),
     "idx": i64(0, 2).reshape(2, 1), "perm": i64(1, 0, 2), "w4": (7, 2), "seven": np.array(7), "onoff": f32(0.5, 2), "w5": (7, 2)},
    "a = MatMul(x, w1)\nh = Add(a, b1)\nw = Unsqueeze(which, axes)\nwide = Expand(w, many)\n"
    "b = GatherElements<axis = 1>(h, wide)\nc = MatMul(b, w2)\nt = Transpose<perm = [1,0,2]>(h)\n"
    "d = GatherND(t, idx)\ne = Transpose<perm = [1,0,2]>(d)\nf = MatMul(e, w3)\ny = Add(c, f)\n"
    "u = Neg(d)\ng = ScatterND(t, idx, u)\ni = Transpose<perm = [1,0,2]>(g)\nm = ScatterElements<axis = 1>(i, wide, b)\n"
    "z0 = MatMul(m, w4)\nv, best = TopK(h, k)\nhot = OneHot(best, seven, onoff)\nhot2 = ReduceMax<keepdims = 0>(hot, axes)\n"
    "z1 = MatMul(hot2, w5)\nz = Add(z0, z1)",
)  # fmt: skip

entry(
    "packed heads of unlike numbers, keys picked by GatherND",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {"w": (6, 30), "b": (30,), "split": i64(0, 0, 6, 5), "lo": i64(0), "hi": i64(-2), "heads": i64(2), "key": i64(-2).reshape(1, 1),
     "value": i64(5).reshape(1, 1), "wo": (20, 2), "join": i64(0, 0, 20), "scale": f32(0.4), "two": i64(1, 0, 3, 2).reshape(4, 1),
     "corner": i64(0, 1, 2, 0).reshape(2, 2), "w1": (5, 7), "w2": (7, 2), "wide": i64(1, 0)},
    "a0 = MatMul(x, w)\na = Add(a0, b)\nc = Reshape(a, split)\nq0 = Slice(c, lo, hi, heads)\n"
    "h = Transpose<perm = [2,0,1,3]>(c)\nk0 = GatherND(h, key)\nv0 = GatherND(h, value)\n"
    "q1 = Transpose<perm = [2,0,1,3]>(q0)\nq2 = GatherND(q1, two)\nq = Transpose<perm = [1,0,2,3]>(q2)\n"
    "k = Transpose<perm = [1,0,3,2]>(k0)\nv = Transpose<perm = [1,0,2,3]>(v0)\ns0 = MatMul(q, k)\ns1 = Mul(s0, scale)\n"
    "p = Softmax(s1)\no0 = MatMul(p, v)\no1 = Transpose<perm = [0,2,1,3]>(o0)\no = Reshape(o1, join)\ny0 = MatMul(o, wo)\n"
    "m = MatMul(w1, w2)\ne = GatherND(m, corner)\ng = ReduceSum(e)\ny = Mul(y0, g)",
)  # fmt: skip

entry(
    "a classifier with its pipeline",
    "float[n,3] x",
    "float[n,2] y, int64[1,n] label",
    {"w1": (3, 7), "b1": (7,), "w2": (7, 2), "labels": i64(10, 20)},
    "s = ai.onnx.ml.Scaler<offset = [0.1, 0.2, 0.3], scale = [1.0, 2.0, 0.5]>(x)\na = MatMul(s, w1)\nb = Add(a, b1)\nc = Relu(b)\n"
    "y = MatMul(c, w2)\nd = ArgMax<axis = 1, keepdims = 0>(y)\nlabel = ai.onnx.ml.ArrayFeatureExtractor(labels, d)",
)  # fmt: skip
entry(
    "a norm whose mean is a global pool",
    "float[n,5,3] x",
    "float[n,5,2] y",
    {"w1": (3, 7), "g": (7,), "s": (7,), "eps": f32(1e-3), "w2": (7, 11), "b2": (11,), "w3": (11, 7), "w4": (7, 2)},
    "a = MatMul(x, w1)\nm = GlobalAveragePool(a)\nd = Sub(a, m)\nq = Mul(d, d)\nv = GlobalAveragePool(q)\n"
    "v1 = Add(v, eps)\nr = Sqrt(v1)\nz = Div(d, r)\nt = Mul(z, g)\nu = Add(t, s)\nc = MatMul(u, w2)\n"
    "e = Add(c, b2)\nf = Relu(e)\nh = MatMul(f, w3)\ni = Add(h, a)\ny = MatMul(i, w4)",
)  # fmt: skip
entry(
    "sequences turned round",
    "float[5,n,3] x",
    "float[5,n,2] y",
    {"w1": (3, 7), "b1": (7,), "w2": (7, 2), "long": i64(4), "one": i64(1), "two": i64(2)},
    "a = MatMul(x, w1)\nb = Add(a, b1)\ns = Shape(b)\nn = Slice(s, one, two)\nl = Expand(long, n)\n"
    "c = ReverseSequence(b, l)\nd = Relu(c)\ny = MatMul(d, w2)",
)  # fmt: skip
entry(
    "probabilities by name",
    "float[n,3] x",
    "seq(map(int64, float)) y",
    {"w1": (3, 7), "b1": (7,), "w2": (7, 2)},
    "a = MatMul(x, w1)\nb = Add(a, b1)\nc = Relu(b)\nd = MatMul(c, w2)\ne = Softmax(d)\n"
    "y = ai.onnx.ml.ZipMap<classlabels_int64s = [10, 20]>(e)",
)  # fmt: skip

# Recurrent ---------------------------------------------------------------------------------------------------------

for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
    entry(
        f"stacked {op}",
        "float[t,n,3] x",
        "float[t,n,2] y",
        {"w1": (1, gates * 7, 3), "r1": (1, gates * 7, 7), "b1": (1, gates * 14), "w2": (1, gates * 5, 7),
         "r2": (1, gates * 5, 5), "w3": (5, 2), "axis": i64(1)},
        f"a = {op}<hidden_size = 7>(x, w1, r1, b1)\nb = Squeeze(a, axis)\nc = {op}<hidden_size = 5>(b, w2, r2)\n"
        "d = Squeeze(c, axis)\ny = MatMul(d, w3)",
    )  # fmt: skip
    entry(
        f"{op} in both directions, with a state",
        "float[4,2,3] x",
        "float[4,2,2] y, float[2,2] z",
        {"w1": (2, gates * 7, 3), "r1": (2, gates * 7, 7), "b1": (2, gates * 14), "start": (2, 2, 7), "w2": (14, 2),
         "join": i64(0, 0, -1), "w3": (14, 2), "flat": i64(0, -1)},
        f'a, last = {op}<hidden_size = 7, direction = "bidirectional">(x, w1, r1, b1, , start)\n'
        "b = Transpose<perm = [0,2,1,3]>(a)\nc = Reshape(b, join)\ny = MatMul(c, w2)\nd = Transpose<perm = [1,0,2]>(last)\n"
        "e = Reshape(d, flat)\nz = MatMul(e, w3)",
    )  # fmt: skip
entry(
    "LSTM with peepholes and computed states",
    "float[t,n,3] x",
    "float[n,2] y",
    {
        "w1": (1, 28, 3),
        "r1": (1, 28, 7),
        "b1": (1, 56),
        "p1": (1, 21),
        "one": i64(1),
        "seven": i64(7),
        "zero": i64(0),
        "two": i64(2),
        "w2": (7, 2),
        "axis": i64(0),
    },
    "s = Shape(x)\nn = Slice(s, one, two, zero)\nto = Concat<axis = 0>(one, n, seven)\nh0 = ConstantOfShape(to)\n"
    "a, h, c = LSTM<hidden_size = 7>(x, w1, r1, b1, , h0, h0, p1)\nb = Add(h, c)\nd = Squeeze(b, axis)\ny = MatMul(d, w2)",
)
entry(
    "quantised LSTM",
    "float[t,n,3] x",
    "float[t,n,2] y",
    {"w1": i8(1, 3, 28), "r1": i8(1, 7, 28),
     "b1": (1, 56), "ws": np.array([0.02], np.float32), "wz": np.array([3], np.int8), "rs": np.array([0.01], np.float32),
     "rz": np.array([-2], np.int8), "w2": (7, 2), "axis": i64(1)},
    "a = com.microsoft.DynamicQuantizeLSTM<hidden_size = 7>(x, w1, r1, b1, , , , , ws, wz, rs, rz)\nb = Squeeze(a, axis)\n"
    "y = MatMul(b, w2)",
)  # fmt: skip

# Whole blocks as one operator --------------------------------------------------------------------------------------

entry(
    "Attention, grouped queries, flat",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {"wq": (6, 24), "wk": (6, 12), "wv": (6, 15), "bv": (15,), "wo": (30, 2), "mask": (1, 6, 1, 1)},
    "q = MatMul(x, wq)\nk = MatMul(x, wk)\nv0 = MatMul(x, wv)\nv = Add(v0, bv)\n"
    "a = Attention<q_num_heads = 6, kv_num_heads = 3>(q, k, v)\ny = MatMul(a, wo)",
    opset=23,
)
entry(
    "Attention, heads apart, rotary",
    "float[n,5,6] x",
    "float[n,5,2] y",
    {"wq": (6, 12), "wk": (6, 12), "wv": (6, 12), "wo": (12, 2), "split": i64(0, 0, 3, 4), "join": i64(0, 0, 12),
     "cos": (5, 2), "sin": (5, 2), "ids": i64(0, 1, 2, 3, 4).reshape(1, 5), "to": i64(-1, 5), "mask": (3, 5, 5), "zero": i64(0),
     "one": i64(1), "five": i64(5)},
    "q0 = MatMul(x, wq)\nk0 = MatMul(x, wk)\nv0 = MatMul(x, wv)\nq1 = Reshape(q0, split)\nk1 = Reshape(k0, split)\n"
    "v1 = Reshape(v0, split)\nq2 = Transpose<perm = [0,2,1,3]>(q1)\nk2 = Transpose<perm = [0,2,1,3]>(k1)\n"
    "v = Transpose<perm = [0,2,1,3]>(v1)\ns = Shape(x)\nn = Slice(s, zero, one)\nbs = Concat<axis = 0>(n, five)\n"
    "pos = Expand(ids, bs)\nq = RotaryEmbedding(q2, cos, sin, pos)\nk = RotaryEmbedding(k2, cos, sin, pos)\n"
    "a = Attention(q, k, v, mask)\nb = Transpose<perm = [0,2,1,3]>(a)\nc = Reshape(b, join)\ny = MatMul(c, wo)",
    opset=23,
)  # fmt: skip
entry(
    "fused encoder block",
    "int32[n,t] ids, int32[n,t] kinds",
    "float[n,t,2] y",
    {"words": (13, 6), "places": (40, 6), "types": (2, 6), "g0": (6,), "s0": (6,), "w": (6, 45), "b": (45,), "wo": (15, 6),
     "bo": (6,), "g1": (6,), "s1": (6,), "w1": (6, 7), "b1": (7,), "w2": (7, 6), "b2": (6,), "g2": (6,), "s2": (6,), "w3": (6, 2)},
    "e, m = com.microsoft.EmbedLayerNormalization(ids, kinds, words, places, types, g0, s0)\n"
    "a = com.microsoft.Attention<num_heads = 3>(e, w, b)\nc = MatMul(a, wo)\n"
    "d = com.microsoft.SkipLayerNormalization(c, e, g1, s1, bo)\nf = MatMul(d, w1)\nh = com.microsoft.BiasGelu(f, b1)\n"
    "i = MatMul(h, w2)\nj, , , sum = com.microsoft.SkipLayerNormalization(i, d, g2, s2, b2)\nk = Add(j, sum)\ny = MatMul(k, w3)",
)  # fmt: skip
entry(
    "fused attention, three projections",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {
        "wq": (6, 12),
        "wk": (6, 12),
        "wv": (6, 15),
        "b": (39,),
        "wo": (15, 6),
        "g": (6,),
        "w1": (6, 7),
        "b1": (7,),
        "w2": (7, 2),
    },
    "q = MatMul(x, wq)\nk = MatMul(x, wk)\nv = MatMul(x, wv)\n"
    "a = com.microsoft.MultiHeadAttention<num_heads = 3>(q, k, v, b)\nc = MatMul(a, wo)\n"
    "d, , , e = com.microsoft.SkipSimplifiedLayerNormalization(c, x, g)\nf = MatMul(d, w1)\nh = com.microsoft.FastGelu(f, b1)\n"
    "y = MatMul(h, w2)",
)
for packed in (False, True):
    entry(
        f"grouped queries in one operator{', packed' if packed else ''}",
        "float[n,t,6] x",
        "float[n,t,2] y",
        {"wq": (6, 96), "wk": (6, 48), "wv": (6, 48), "w": (6, 192), "wo": (96, 2), "cos": (64, 8), "sin": (64, 8),
         "zero": i64(0), "i1": np.array(1), "one": i64(1), "onenp": np.array(1)},
        "s = Shape(x)\nn = Slice(s, zero, one)\nt0 = Gather(s, i1)\nt1 = Sub(t0, onenp)\nt2 = Expand(t1, n)\n"
        "ends = Cast<to = 6>(t2)\nlen = Cast<to = 6>(t0)\n"
        + ("q = MatMul(x, w)\n" if packed else "q = MatMul(x, wq)\nk = MatMul(x, wk)\nv = MatMul(x, wv)\n")
        + "a, pk, pv = com.microsoft.GroupQueryAttention<num_heads = 6, kv_num_heads = 3, do_rotary = 1>"
        + f"(q, {', ' if packed else 'k, v'}, , , ends, len, cos, sin)\ny = MatMul(a, wo)",
    )  # fmt: skip
CACHES = "float[n,3,p,d] pk, float[n,3,p,d] pv"  # the operator alone says how long d is
entry(
    "grouped queries over a cache of open sizes",
    f"float[n,s,6] x, int64[n,t] mask, {CACHES}",
    "float[n,s,2] y, float[n,3,u,d] nk, float[n,3,u,d] nv",
    {"w": (6, 192), "w1": (96, 11), "w2": (11, 2), "cos": (64, 8), "sin": (64, 8), "one": i64(1), "i1": np.array(1)},
    "m0 = ReduceSum<keepdims = 0>(mask, one)\nm1 = Sub(m0, one)\nends = Cast<to = 6>(m1)\n"
    "s0 = Shape(mask)\ns1 = Gather(s0, i1)\nlen = Cast<to = 6>(s1)\nq = MatMul(x, w)\n"
    "a, nk, nv = com.microsoft.GroupQueryAttention<num_heads = 6, kv_num_heads = 3, do_rotary = 1>"
    "(q, , , pk, pv, ends, len, cos, sin)\nb = MatMul(a, w1)\nc = Relu(b)\ny = MatMul(c, w2)",
)
entry(
    "heads over a cache of open sizes, mask as long as past and present",
    f"float[n,s,6] x, float[n,1,s,t] mask, {CACHES}",
    "float[n,s,2] y, float[n,3,u,d] nk, float[n,3,u,d] nv",
    {"wq": (6, 12), "wk": (6, 12), "wv": (6, 12), "w1": (12, 7), "w2": (7, 2)},
    "q = MatMul(x, wq)\nk = MatMul(x, wk)\nv = MatMul(x, wv)\n"
    "a, nk, nv = com.microsoft.MultiHeadAttention<num_heads = 3>(q, k, v, , , mask, pk, pv)\n"
    "b = MatMul(a, w1)\nc = Relu(b)\ny = MatMul(c, w2)",
)
entry(
    "Attention over a cache of open sizes",
    f"float[n,s,6] x, {CACHES}",
    "float[n,s,2] y, float[n,3,u,d] nk, float[n,3,u,d] nv",
    {"wq": (6, 24), "wk": (6, 12), "wv": (6, 12), "w1": (24, 7), "w2": (7, 2)},
    "q = MatMul(x, wq)\nk = MatMul(x, wk)\nv = MatMul(x, wv)\n"
    "a, nk, nv = Attention<q_num_heads = 6, kv_num_heads = 3>(q, k, v, , pk, pv)\n"
    "b = MatMul(a, w1)\nc = Relu(b)\ny = MatMul(c, w2)",
    opset=23,
    ir=11,
)
entry(
    "keys behind a cache, of which the mask knows the first tokens or one",
    "float[n,s,6] x, float[n,3,p,d] past, int64[n,t] mask",
    "float[n,s,2] y",
    {"wq": (6, 12), "wk": (6, 12), "w1": (12, 7), "w2": (7, 2), "heads": i64(0, -1, 3, 4),
     "flat": i64(0, -1, 12), "t0": i64(0), "t1": i64(1), "t2": i64(2), "t12": i64(1, 2)},
    "q0 = MatMul(x, wq)\nq1 = Reshape(q0, heads)\nq = Transpose<perm = [0,2,1,3]>(q1)\n"
    "k0 = MatMul(x, wk)\nk1 = Reshape(k0, heads)\nk2 = Transpose<perm = [0,2,1,3]>(k1)\n"
    "k = Concat<axis = 2>(past, k2)\nkt = Transpose<perm = [0,1,3,2]>(k)\nscores = MatMul(q, kt)\n"
    "xs = Shape(x)\ns = Slice(xs, t1, t2)\nss = Concat<axis = 0>(s, s)\nzeros = ConstantOfShape(ss)\n"
    "n = Slice(xs, t0, t1)\nms = Shape(mask)\nt = Slice(ms, t1, t2)\nfull = Concat<axis = 0>(n, t1, s, t)\n"
    "open = Expand(zeros, full)\nm0 = Cast<to = 1>(mask)\nm = Unsqueeze(m0, t12)\nsum = Add(open, m)\n"
    "masked = Add(scores, sum)\nprobs = Softmax<axis = -1>(masked)\n"
    "c0 = MatMul(probs, k)\nc1 = Transpose<perm = [0,2,1,3]>(c0)\nc2 = Reshape(c1, flat)\n"
    "b = MatMul(c2, w1)\nc = Relu(b)\ny = MatMul(c, w2)",
)  # fmt: skip
entry(
    "rotary by ONNX Runtime",
    "float[n,5,6] x",
    "float[n,5,2] y",
    {"wq": (6, 24), "wk": (6, 24), "wv": (6, 24), "wo": (24, 2), "cos": (5, 4), "sin": (5, 4), "first": i64(0)},
    "q0 = MatMul(x, wq)\nk0 = MatMul(x, wk)\nv = MatMul(x, wv)\n"
    "q = com.microsoft.RotaryEmbedding(q0, first, cos, sin)\nk = com.microsoft.RotaryEmbedding(k0, first, cos, sin)\n"
    "a = com.microsoft.MultiHeadAttention<num_heads = 3>(q, k, v)\ny = MatMul(a, wo)",
)
entry(
    "fused linear operators",
    "float[n,3,5,4] x, float[n,6] z",
    "float[n,2] y",
    {"w0": (7, 3, 3, 3), "b0": (7,), "w1": (7, 3, 3, 3), "w2": (2, 7), "w3": (11, 6), "b3": (11,), "w4": (11, 2)},
    'c = Conv<pads = [1,1,1,1]>(x, w1)\na = com.microsoft.FusedConv<activation = "Relu", pads = [1,1,1,1]>(x, w0, b0, c)\n'
    "b = GlobalAveragePool(a)\nd = Flatten(b)\ne = com.microsoft.FusedMatMul<transB = 1, alpha = 0.5>(d, w2)\n"
    'f = com.microsoft.FusedGemm<transB = 1, activation = "Relu">(z, w3, b3)\ng = MatMul(f, w4)\ny = Add(e, g)',
)
entry(
    "Einsum: heads, experts in a stack",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {
        "wq": (6, 3, 5),
        "wk": (6, 3, 5),
        "wv": (6, 3, 7),
        "wo": (3, 7, 6),
        "router": (6, 4),
        "up": (4, 6, 11),
        "down": (4, 11, 2),
    },
    'q = Einsum<equation = "btd,dhk->bthk">(x, wq)\nk = Einsum<equation = "btd,dhk->bthk">(x, wk)\n'
    'v = Einsum<equation = "btd,dhk->bthk">(x, wv)\ns = Einsum<equation = "bqhd,bkhd->bhqk">(q, k)\np = Softmax(s)\n'
    'o = Einsum<equation = "bhqk,bkhd->bqhd">(p, v)\nr = Einsum<equation = "bqhd,hdm->bqm">(o, wo)\nl = MatMul(r, router)\n'
    'g = Softmax(l)\nu = Einsum<equation = "...d,edf->...ef">(r, up)\nh = Relu(u)\ni = Einsum<equation = "btef,efd->bted">(h, down)\n'
    'y = Einsum<equation = "bte,bted->btd">(g, i)',
)

# Mixtures of experts -----------------------------------------------------------------------------------------------

ROUTER = "l = MatMul(x, router)\np = Softmax(l)\nv, chosen = TopK(p, k)\nsum = ReduceSum(v, last)\ngate = Div(v, sum)\n"
EXPERTS = {"router": (6, 7), "k": i64(2), "last": i64(-1), "up": (7, 6, 11), "down": (7, 11, 2)}
entry(
    "experts fetched for each token",
    "float[n,6] x",
    "float[n,2] y",
    {**EXPERTS, "flat": i64(-1), "one": i64(1), "two": i64(2), "back": i64(-1, 2, 2), "many": i64(1, 2, 1), "rows": i64(-1, 1, 6)},
    f"{ROUTER}a = Reshape(chosen, flat)\nb = Unsqueeze(a, last)\nw1 = GatherND(up, b)\nw2 = Gather<axis = 0>(down, a)\nc = Unsqueeze(x, one)\n"
    "d = Tile(c, many)\ne = Reshape(d, rows)\nf = MatMul(e, w1)\ng = Relu(f)\nh = MatMul(g, w2)\ni = Squeeze(h, one)\nj = Reshape(i, back)\n"
    "m = Unsqueeze(gate, two)\no = Mul(j, m)\ny = ReduceSum<keepdims = 0>(o, one)",
)  # fmt: skip
entry(
    "experts by a scattered gate",
    "float[n,6] x",
    "float[n,2] y",
    {**EXPERTS, "zero": f32(0)},
    f"{ROUTER}s = Shape(p)\nnone = ConstantOfShape(s)\ndense = ScatterElements<axis = 1>(none, chosen, gate)\n"
    'a = Einsum<equation = "td,edf->tef">(x, up)\nb = Relu(a)\nc = Einsum<equation = "tef,efd->ted">(b, down)\n'
    'y = Einsum<equation = "te,ted->td">(dense, c)',
)  # fmt: skip
entry(
    "experts by one-hot masks",
    "float[n,6] x",
    "float[n,2] y",
    {**EXPERTS, "depth": i64(7), "onoff": f32(0, 1), "two": i64(2), "one": i64(1)},
    f"{ROUTER}hot = OneHot(chosen, depth, onoff)\ng = Unsqueeze(gate, two)\nh = Mul(hot, g)\ndense = ReduceSum<keepdims = 0>(h, one)\n"
    "t = Unsqueeze(x, one)\nu = Transpose<perm = [1,0,2]>(t)\na = MatMul(u, up)\nb = Relu(a)\nc = MatMul(b, down)\n"
    'y = Einsum<equation = "te,etd->td">(dense, c)',
)  # fmt: skip
entry(
    "the chosen numbers are shown",
    "float[n,6] x",
    "float[n,2] y, int64[n,2] chosen",
    {**EXPERTS, "w": (2, 2)},
    f"{ROUTER}y = MatMul(gate, w)",
)


def expert(e: int, gate: str, y: str, x: str = "x") -> str:
    """A layer of its own for expert e, times its gate."""
    return f"h{e} = MatMul({x}, up{e})\nr{e} = Relu(h{e})\nd{e} = MatMul(r{e}, down{e})\n{y} = Mul(d{e}, {gate})\n"


LOOP = {name: shape for e in range(5) for name, shape in ((f"up{e}", (6, 11)), (f"down{e}", (11, 2)))}
entry(
    "experts in a loop, columns of the gate gathered and summed one after the other",
    "float[n,6] x",
    "float[n,2] y",
    {"router": (6, 5), "rb": (5,), **{f"i{e}": i64(e) if e % 2 else np.array(e - 5) for e in range(5)}, "one": i64(1), **LOOP},
    "l0 = MatMul(x, router)\nl = Add(l0, rb)\np = Softmax(l)\n"
    + "".join(
        f"q{e} = Gather<axis = 1>(p, i{e})\n" + ("" if e % 2 else f"g{e} = Unsqueeze(q{e}, one)\n")
        + expert(e, f"q{e}" if e % 2 else f"g{e}", f"o{e}") for e in range(5)
    )
    + "s1 = Add(o0, o1)\ns2 = Add(s1, o2)\ns3 = Add(s2, o3)\ny = Add(s3, o4)",
)  # fmt: skip
entry(
    "experts in a loop behind a scattered top-k gate, sliced, from zeros, beside a shared one",
    "float[n,6] x",
    "float[n,2] y",
    {"router": (6, 5), "k": i64(2), "last": i64(-1), "zero": f32(0), "two": i64(0, 2), "axis": i64(1),
     **{f"i{e}": i64(e) for e in range(6)}, "up": (6, 13), "down": (13, 2), "n2": i64(2), "size": i64(0), **LOOP},
    ROUTER + "ps = Shape(p)\nnone = ConstantOfShape(ps)\ndense = ScatterElements<axis = 1>(none, chosen, gate)\n"
    + "xs = Shape(x)\nxn = Gather(xs, size)\noutsize = Concat<axis = 0>(xn, n2)\nz = ConstantOfShape(outsize)\n"
    + "".join(f"g{e} = Slice(dense, i{e}, i{e + 1}, axis)\n" + expert(e, f"g{e}", f"o{e}") for e in range(5))
    + "t0 = Add(z, o0)\nt1 = Add(t0, o1)\nt2 = Add(t1, o2)\nt3 = Add(t2, o3)\nt4 = Add(t3, o4)\n"
    + "h = MatMul(x, up)\nr = Relu(h)\nd = MatMul(r, down)\ny = Add(t4, d)",
)  # fmt: skip
entry(
    "experts in a loop by a split gate without a norm, one Sum, in a residual block",
    "float[n,6] x",
    "float[n,2] y",
    {"w": (6, 6), "router": (6, 5), "head": (6, 2),
     **{name: shape for e in range(5) for name, shape in ((f"up{e}", (6, 11)), (f"down{e}", (11, 6)))}},
    "x0 = MatMul(x, w)\nl = MatMul(x0, router)\np = Sigmoid(l)\n"
    "g0, g1, g2, g3, g4 = Split<axis = -1, num_outputs = 5>(p)\n"
    + "".join(expert(e, f"g{e}", f"o{e}", "x0") for e in range(5))
    + "s = Sum(o0, o1, o2, o3, o4)\nx1 = Add(x0, s)\ny = MatMul(x1, head)",
)  # fmt: skip
entry(
    "experts in a loop, the chosen numbers compared with each one's own",
    "float[n,6] x",
    "float[n,2] y",
    {"router": (6, 5), "k": i64(2), "last": i64(-1), **{f"i{e}": np.array(e) for e in range(5)}, **LOOP},
    ROUTER
    + "".join(
        f"e{e} = Equal(chosen, i{e})\nc{e} = Cast<to = 1>(e{e})\nm{e} = Mul(c{e}, gate)\ng{e} = ReduceSum(m{e}, last)\n"
        + expert(e, f"g{e}", f"o{e}") for e in range(5)
    )
    + "y = Sum(o0, o1, o2, o3, o4)",
)  # fmt: skip
entry(
    "experts in a loop, one-hot by comparison with a table, backwards",
    "float[n,6] x",
    "float[n,2] y",
    {"router": (6, 5), "k": i64(2), "last": i64(-1), "table": i64(4, 3, 2, 1, 0), "one": i64(1), "two": i64(2),
     **{f"i{e}": np.array(e) for e in range(5)}, **LOOP},
    ROUTER + "n = Unsqueeze(chosen, two)\nhit = Equal(table, n)\nhot = Cast<to = 1>(hit)\ng = Unsqueeze(gate, two)\n"
    "m = Mul(hot, g)\ndense = ReduceSum<keepdims = 0>(m, one)\n"
    + "".join(
        f"q{e} = Gather<axis = 1>(dense, i{e})\ng{e} = Unsqueeze(q{e}, one)\n" + expert(e, f"g{e}", f"o{e}")
        for e in range(5)
    )
    + "y = Sum(o0, o1, o2, o3, o4)",
)  # fmt: skip
entry(
    "experts in a loop, stacked",
    "float[n,6] x",
    "float[n,2] y",
    {"router": (6, 5), "k": i64(2), "last": i64(-1), "depth": i64(5), "onoff": f32(0, 1), "one": i64(1), "two": i64(2), **LOOP},
    f"{ROUTER}hot = OneHot(chosen, depth, onoff)\ng0 = Unsqueeze(gate, two)\nm0 = Mul(hot, g0)\ndense = ReduceSum<keepdims = 0>(m0, one)\n"
    + "".join(f"h{e} = MatMul(x, up{e})\nr{e} = Relu(h{e})\nd{e} = MatMul(r{e}, down{e})\no{e} = Unsqueeze(d{e}, one)\n" for e in range(5))
    + "s = Concat<axis = 1>(o0, o1, o2, o3, o4)\ng = Unsqueeze(dense, two)\nm = Mul(s, g)\ny = ReduceSum<keepdims = 0>(m, one)",
)  # fmt: skip

# Quantised ---------------------------------------------------------------------------------------------------------

SCALES = {"s": np.array(0.05, np.float32), "z": np.array(120, np.uint8), "zi": np.array(2, np.int8)}
entry(
    "QLinear convolutions",
    "float[n,3,4,4] x",
    "float[n,2,1,1] y",
    {**SCALES, "w0": i8(8, 3, 3, 3), "s0": np.full(8, 0.02, np.float32), "z0": np.full(8, 3, np.int8),
     "b0": np.arange(8, dtype=np.int32) * 40, "w1": i8(8, 2, 1, 1), "w2": i8(2, 8, 1, 1)},
    "a = QuantizeLinear(x, s, z)\nb = QLinearConv<pads = [1,1,1,1]>(a, s, z, w0, s0, z0, s, z, b0)\n"
    "c = QLinearConv<group = 4>(b, s, z, w1, s, zi, s, z)\nd = com.microsoft.QLinearAdd(b, s, z, c, s, z, s, z)\n"
    "e = com.microsoft.QLinearLeakyRelu(d, s, z, s, z)\nf = com.microsoft.QLinearSigmoid(e, s, z, s, z)\n"
    "g = com.microsoft.QLinearMul(e, s, z, f, s, z, s, z)\n"
    "h = com.microsoft.QLinearAveragePool<kernel_shape = [2,2]>(g, s, z, s, z)\n"
    "i = com.microsoft.QLinearGlobalAveragePool(g, s, z, s, z)\nj = QLinearConv(i, s, z, w2, s, zi, s, z)\ny = DequantizeLinear(j, s, z)",
)  # fmt: skip
entry(
    "QLinear attention, masked, beside a second branch",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {**SCALES, "wq": i8(6, 15), "wk": i8(6, 15), "wv": i8(6, 15), "wo": i8(22, 2), "w1": i8(6, 7), "split": i64(0, 0, 3, 5),
     "join": i64(0, 0, 15), "zs": np.array(0, np.uint8), "ps": np.array(1 / 255, np.float32), "low": np.array(3, np.uint8),
     "flag": np.array([[[True]], [[False]], [[True]]])},
    "f = QuantizeLinear(x, s, z)\n"
    + "".join(f"{n}0 = QLinearMatMul(f, s, z, w{n}, s, zi, s, z)\n" for n in "qkv")
    + "q1 = Reshape(q0, split)\nk1 = Reshape(k0, split)\nv1 = Reshape(v0, split)\nq = Transpose<perm = [0,2,1,3]>(q1)\n"
    "k = Transpose<perm = [0,2,3,1]>(k1)\nv = Transpose<perm = [0,2,1,3]>(v1)\ns0 = QLinearMatMul(q, s, z, k, s, z, s, z)\n"
    "s1 = com.microsoft.QLinearWhere(flag, s0, s, z, low, s, z, s, z)\n"
    "p = com.microsoft.QLinearSoftmax<axis = -1, opset = 13>(s1, s, z, ps, zs)\n"
    "o0 = QLinearMatMul(p, ps, zs, v, s, z, s, z)\no1 = Transpose<perm = [0,2,1,3]>(o0)\no2 = Reshape(o1, join)\n"
    "e = QLinearMatMul(f, s, z, w1, s, zi, s, z)\no = com.microsoft.QLinearConcat<axis = 2>(s, z, o2, s, z, e, s, z)\n"
    "y0 = QLinearMatMul(o, s, z, wo, s, zi, s, z)\ny = DequantizeLinear(y0, s, z)",
)  # fmt: skip
entry(
    "quantised matrix products",
    "float[n,6] x",
    "float[n,2] y",
    {**SCALES, "w0": i8(6, 7), "s0": np.full(7, 0.02, np.float32), "z0": np.full(7, 3, np.int8), "w1": i8(7, 11),
     "w2": i8(2, 11), "b2": np.arange(2, dtype=np.int32), "w3": i8(6, 5), "s3": np.full(5, 0.03, np.float32),
     "z3": np.full(5, -2, np.int8), "w4": i8(5, 3), "b4": (3,), "w5": i8(3, 2), "b5": (2,)},
    "a = QuantizeLinear(x, s, z)\nb = QLinearMatMul(a, s, z, w0, s0, z0, s, z)\nc = QLinearMatMul(b, s, z, w1, s, zi, s, z)\n"
    "d = com.microsoft.QGemm<transB = 1>(c, s, z, w2, s, zi, b2, s, z)\ne = DequantizeLinear(d, s, z)\n"
    "f, fs, fz = DynamicQuantizeLinear(x)\ng = MatMulInteger(f, w3, fz, z3)\nh = Cast<to = 1>(g)\ni = Mul(h, s3)\nj = Mul(i, fs)\n"
    "k = com.microsoft.DynamicQuantizeMatMul(j, w4, s, zi, b4)\nl, ls, lz = DynamicQuantizeLinear(k)\n"
    "m = com.microsoft.MatMulIntegerToFloat(l, w5, ls, s, lz, zi, b5)\ny = Add(e, m)",
)  # fmt: skip
entry(
    "convolution in integers",
    "float[n,3,4,4] x",
    "float[n,2,4,4] y",
    {"w0": i8(7, 3, 1, 1), "z0": np.array(2, np.int8), "wd": i8(7, 1, 3, 3), "w1": i8(2, 7, 1, 1),
     "s0": np.array(0.02, np.float32)},
    "f, fs, fz = DynamicQuantizeLinear(x)\na = ConvInteger(f, w0, fz, z0)\nb = Cast<to = 1>(a)\nc = Mul(b, s0)\nd0 = Relu(c)\n"
    "j, js, jz = DynamicQuantizeLinear(d0)\nk = ConvInteger<group = 7, pads = [1,1,1,1]>(j, wd, jz, z0)\nd1 = Cast<to = 1>(k)\n"
    "d = Mul(d1, s0)\ng, gs, gz = DynamicQuantizeLinear(d)\nh = ConvInteger(g, w1, gz, z0)\ni = Cast<to = 1>(h)\ny = Mul(i, s0)",
)  # fmt: skip
for zero, extra in (
    ("", {}),
    (", z0", {"z0": np.full((48, 1), 0x79, np.uint8), "z1": np.full((2, 2), 0x68, np.uint8)}),
):
    entry(
        f"four bits{' with zero points' if zero else ''}",
        "float[n,32] x",
        "float[n,2] y",
        {"q0": i8(48, 2, 8).view(np.uint8), "s0": (48, 2), "q1": i8(2, 3, 8).view(np.uint8), "s1": (2, 3), **extra},
        f"a = com.microsoft.MatMulNBits<K = 32, N = 48, bits = 4, block_size = 16>(x, q0, s0{zero})\nb = Relu(a)\n"
        f"y = com.microsoft.MatMulNBits<K = 48, N = 2, bits = 4, block_size = 16>(b, q1, s1{zero.replace('0', '1')})",
    )

for full in (48, 41):
    entry(
        f"four bits, heads of one block, {'full' if full == 48 else 'padded'} blocks",
        "float[n,t,6] x",
        "float[n,t,2] y",
        {"wq": (6, 48), "wk": (6, 48), "wv": (6, 48), "split": i64(0, 0, 3, 16), "join": i64(0, 0, 48), "scale": f32(0.25),
         "b0": i8(7, 3, 8).view(np.uint8), "s2": (7, 3), "w1": (7, full), "b1": i8(2, 3, 8).view(np.uint8), "s3": (2, 3)},
        "q0 = MatMul(x, wq)\nk0 = MatMul(x, wk)\nv0 = MatMul(x, wv)\n"
        + ATTENTION.replace("y = MatMul(o, wo)", "")
        + "h = com.microsoft.MatMulNBits<K = 48, N = 7, bits = 4, block_size = 16>(o, b0, s2)\ng = MatMul(h, w1)\n"
        f"f = Relu(g)\ny = com.microsoft.MatMulNBits<K = {full}, N = 2, bits = 4, block_size = 16>(f, b1, s3)",
    )  # fmt: skip

entry(
    "four bits, two zero points a byte, heads of two blocks",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {"wq": (6, 96), "wk": (6, 96), "wv": (6, 96), "split": i64(0, 0, 3, 32), "join": i64(0, 0, 96), "scale": f32(0.25),
     "b0": i8(7, 6, 8).view(np.uint8), "s2": (7, 6), "z2": i8(7, 3).view(np.uint8), "w1": (7, 73),
     "b1": i8(2, 5, 8).view(np.uint8), "s3": (10,), "z3": i8(6).view(np.uint8)},
    "q0 = MatMul(x, wq)\nk0 = MatMul(x, wk)\nv0 = MatMul(x, wv)\n"
    + ATTENTION.replace("y = MatMul(o, wo)", "")
    + "h = com.microsoft.MatMulNBits<K = 96, N = 7, bits = 4, block_size = 16>(o, b0, s2, z2)\ng = MatMul(h, w1)\n"
    "f = Relu(g)\ny = com.microsoft.MatMulNBits<K = 73, N = 2, bits = 4, block_size = 16>(f, b1, s3, z3)",
)  # fmt: skip

entry(
    "batch from a product with the heads, divided at run time",
    "float[n,4,6] x",
    "float[n,4,2] y",
    {"w": (6, 15), "b": (15,), "split": i64(0, 0, 3, 5), "fold": i64(-1, 4, 5), "first": np.array(0), "three": np.array(3), "axis": i64(0),
     "rest": i64(3, 4, 5), "join": i64(0, 0, 15), "wo": (15, 2), "one": i64(1, 1), "rel": (3, 4, 5), "far": (1, 3, 4, 5)},
    "a0 = MatMul(x, w)\na = Add(a0, b)\nc = Reshape(a, split)\nd = Transpose<perm = [0,2,1,3]>(c)\ne = Reshape(d, fold)\n"
    "f = Tanh(e)\ns = Shape(f)\nsize = Gather(s, first)\nn0 = Div(size, three)\nn1 = Unsqueeze(n0, axis)\n"
    "times = Concat<axis = 0>(n1, one)\nall = Tile(rel, times)\nt = Mul(f, all)\nto = Concat<axis = 0>(n1, rest)\n"
    "g0 = Reshape(t, to)\nwide = Expand(far, to)\ng = Add(g0, wide)\nh = Transpose<perm = [0,2,1,3]>(g)\ni = Reshape(h, join)\ny = MatMul(i, wo)",
)  # fmt: skip

# Dynamic sizes that depend on each other ----------------------------------------------------------------------------

entry(
    "a mask whose sizes have names of their own",
    "float[n,t,6] x, float[m,1,1,u] mask",
    "float[n,t,2] y",
    {"wq": (6, 15), "wk": (6, 15), "wv": (6, 15), "wo": (15, 2), "split": i64(0, 0, 3, 5), "join": i64(0, 0, 15), "scale": f32(0.4)},
    "q0 = MatMul(x, wq)\nk0 = MatMul(x, wk)\nv0 = MatMul(x, wv)\n" + ATTENTION.replace("Softmax(s1)", "Softmax(s2)").replace(
        "p = ", "s2 = Add(s1, mask)\np = "),
)  # fmt: skip
entry(
    "a cache: the mask is as long as past and present together",
    "float[n,t,6] x, float[n,3,p,5] k2, float[n,3,p,7] v2, float[n,1,1,total] mask",
    "float[n,t,2] y",
    {"wq": (6, 15), "wk": (6, 15), "wv": (6, 21), "w1": (21, 11), "w2": (11, 2), "split": i64(0, 0, 3, 5),
     "split2": i64(0, 0, 3, 7), "join": i64(0, 0, 21)},
    "q0 = MatMul(x, wq)\nk0 = MatMul(x, wk)\nv0 = MatMul(x, wv)\nq1 = Reshape(q0, split)\nk1 = Reshape(k0, split)\n"
    "v1 = Reshape(v0, split2)\nq = Transpose<perm = [0,2,1,3]>(q1)\nk3 = Transpose<perm = [0,2,1,3]>(k1)\n"
    "v3 = Transpose<perm = [0,2,1,3]>(v1)\nk4 = Concat<axis = 2>(k2, k3)\nv = Concat<axis = 2>(v2, v3)\n"
    "k = Transpose<perm = [0,1,3,2]>(k4)\ns0 = MatMul(q, k)\ns1 = Add(s0, mask)\np0 = Softmax(s1)\no0 = MatMul(p0, v)\n"
    "o1 = Transpose<perm = [0,2,1,3]>(o0)\no = Reshape(o1, join)\nh = MatMul(o, w1)\ng = Relu(h)\ny = MatMul(g, w2)",
)  # fmt: skip

# Control flow and functions ----------------------------------------------------------------------------------------

entry(
    "weights in both branches",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (7, 11), "b1": (11,), "w2": (7, 5), "w3": (5, 11), "w4": (11, 2)},
    "a = MatMul(x, w0)\n"
    "d = If(flag) <then_branch = yes () => (float[n,11] p) <float[11] b1> { q = MatMul(a, w1) p = Add(q, b1) },\n"
    "  else_branch = no () => (float[n,11] r) <float[5,11] w3> { w2 = Constant<value_int = 0>() s = Relu(a) t = MatMul(s, w2)\n"
    "    u = Tanh(t) r = MatMul(u, w3) }>\n"
    "e = Relu(d)\ny = MatMul(e, w4)",
)
entry(
    "one initializer in both branches",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (7, 41), "b": (41,), "w4": (41, 2)},
    "a = MatMul(x, w0)\nc = If(flag) <then_branch = yes () => (float[n,41] p) { q = MatMul(a, w1) p = Add(q, b) },\n"
    "  else_branch = no () => (float[n,41] r) { s = Neg(a) t = MatMul(s, w1) r = Sub(t, b) }>\n"
    "e = Relu(c)\ny = MatMul(e, w4)",
)
entry(
    "a branch gives a constant",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w0": (3, 7), "b": (7,), "w1": (7, 2), "zero": i64(0)},
    "a = MatMul(x, w0)\n"
    "c, d = If(flag) <then_branch = yes () => (float[7] b, float[n,7] r) { b = Constant<value_int = 0>() r = Tanh(a) },\n"
    "  else_branch = no () => (float[7] p, float[n,7] q) { q = Relu(a) p = ReduceSum<keepdims = 0>(q, zero) }>\n"
    "e = Add(d, c)\ny = MatMul(e, w1)",
)
entry(
    "branches inside branches",
    "float[n,3] x, bool flag, bool other",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (7, 5), "w2": (7, 5), "w3": (7, 11), "w5": (11, 5), "w4": (5, 2)},
    "a = MatMul(x, w0)\nb = Relu(a)\n"
    "d = If(flag) <then_branch = yes () => (float[n,5] p) {\n"
    "  w3 = Constant<value_int = 0>() c = MatMul(b, w3) f = Sigmoid(c)\n"
    "  p = If(other) <then_branch = yes2 () => (float[n,5] p2) { w5 = Constant<value_int = 0>() p2 = MatMul(f, w5) },\n"
    "    else_branch = no2 () => (float[n,5] r2) { r2 = MatMul(b, w1) }> },\n"
    "  else_branch = no () => (float[n,5] r) { r = MatMul(b, w2) }>\n"
    "e = Relu(d)\ny = MatMul(e, w4)",
)
entry(
    "a branch that is always taken",
    "float[n,3,1] x",
    "float[n,2] y",
    {"w0": (7, 3, 1), "w1": (7, 11), "w2": (11, 2), "w3": (7, 2), "one": i64(1), "two": i64(2), "i": np.array(2)},
    "a = Conv(x, w0)\nb = Shape(a)\nc = Gather(b, i)\nd = Equal(c, one)\n"
    "e = If(d) <then_branch = yes () => (float[n,7] p) { p = Squeeze(a, two) },\n"
    "  else_branch = no () => (float[n,7,1] q) { q = Identity(a) }>\n"
    "f = Shape(e)\ng = Size(f)\nh = Equal(g, i)\n"
    "y = If(h) <then_branch = yes () => (float[n,2] p) { w1 = Constant<value_int = 0>() q = MatMul(e, w1) r = Relu(q) p = MatMul(r, w2) },\n"
    "  else_branch = no () => (float[n,2] p) { p = MatMul(e, w3) }>",
)
entry(
    "the same names in both branches and outside",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (7, 5), "w2": (5, 11), "w4": (11, 2)},
    "a = MatMul(x, w0)\nb = Relu(a)\n"
    "d = If(flag) <then_branch = yes () => (float[n,11] p) { w1 = Constant<value_int = 0>() q = MatMul(b, w1) r = Relu(q) p = MatMul(r, w2) },\n"
    "  else_branch = no () => (float[n,11] p) { w1 = Constant<value_int = 0>() q = MatMul(b, w1) r = Tanh(q) p = MatMul(r, w2) }>\n"
    "y = MatMul(d, w4)",
)
entry(
    "shapes that depend on the branch",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (7, 11), "w2": (11, 7), "w3": (7, 2), "one": i64(1), "back": i64(0, 7)},
    "a = MatMul(x, w0)\nb = MatMul(a, w1)\nc = Relu(b)\nd = MatMul(c, w2)\n"
    "e = If(flag) <then_branch = yes () => (float[n,1,7] p) { p = Unsqueeze(d, one) },\n"
    "  else_branch = no () => (float[n,7] q) { q = Identity(d) }>\n"
    "f = Reshape(e, back)\ny = MatMul(f, w3)",
)
entry(
    "a residual sum around branches",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (7, 11), "w2": (11, 7), "w3": (7, 7), "w4": (7, 13), "w5": (13, 7), "w6": (7, 2)},
    "a = MatMul(x, w0)\nb = MatMul(a, w1)\n"
    "c = If(flag) <then_branch = yes () => (float[n,11] p) { p = Relu(b) }, else_branch = no () => (float[n,11] q) { q = Neg(b) }>\n"
    "d = MatMul(c, w2)\ne = Add(a, d)\n"
    "f = If(flag) <then_branch = yes2 () => (float[n,7] r) { r = MatMul(e, w3) },\n"
    "  else_branch = no2 () => (float[n,7] s) { t = MatMul(e, w4) u = Tanh(t) v = MatMul(u, w5) s = Add(e, v) }>\n"
    "g = Add(e, f)\ny = MatMul(g, w6)",
)
entry(
    "softmax in a branch",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (7, 11), "w2": (7, 11), "w3": (11, 2)},
    "a = MatMul(x, w0)\nb = Relu(a)\n"
    "d = If(flag) <then_branch = yes () => (float[n,11] p) { q = MatMul(b, w1) p = Softmax<axis = -1>(q) },\n"
    "  else_branch = no () => (float[n,11] r) { s = MatMul(b, w2) r = Sigmoid(s) }>\n"
    "y = MatMul(d, w3)",
)
entry(
    "numbers from sizes in a branch",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (7, 11), "w3": (11, 2), "one": i64(1), "two": np.array(2)},
    "a = MatMul(x, w0)\nb = Relu(a)\n"
    "c, k = If(flag) <then_branch = yes () => (float[n,11] p, int64 e) { p = MatMul(b, w1) f = Size(p) e = Cast<to = 7>(f) },\n"
    "  else_branch = no () => (float[n,11] r, int64 g) { h = Neg(b) r = MatMul(h, w1) i = Shape(b) g = ReduceProd<keepdims = 0>(i) }>\n"
    "l = Cast<to = 1>(k)\nm = Div(c, l)\ny = MatMul(m, w3)",
)
LOOP = "a = MatMul(x, w0)\nh0 = MatMul(x, w1)\n"
entry(
    "a state in a loop",
    "float[n,3] x",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (3, 7), "w2": (7, 7), "w3": (7, 11), "w4": (11, 7), "w5": (7, 2), "trip": np.array(3), "go": np.array(True)},
    LOOP + "h = Loop(trip, go, h0) <body = round (int64 i, bool on, float[n,7] hi) => (bool on2, float[n,7] ho)\n"
    "  { on2 = Identity(on) b = MatMul(hi, w2) c = Add(b, a) d = Tanh(c) w3 = Constant<value_int = 0>() e = MatMul(d, w3)\n"
    "    f = Relu(e) ho = MatMul(f, w4) }>\n"
    "y = MatMul(h, w5)",
)  # fmt: skip
entry(
    "a loop that collects",
    "float[n,3] x",
    "float[n,2] y, float[n,5] z",
    {"w0": (3, 7), "w1": (3, 11), "w2": (11, 7), "w3": (7, 11), "w5": (11, 2), "w6": (7, 5), "zero": i64(0), "count": np.array(3),
     "go": np.array(True)},
    LOOP + "h, all = Loop(count, go, h0) <body = round (int64 i, bool on, float[n,11] hi) => (bool on, float[n,11] ho, float[n,7] e)\n"
    "  { b = MatMul(hi, w2) c = Add(b, a) e = Tanh(c) ho = MatMul(e, w3) }>\n"
    "y = MatMul(h, w5)\nf = ReduceSum<keepdims = 0>(all, zero)\nz = MatMul(f, w6)",
)  # fmt: skip
entry(
    "a loop that may end early",
    "float[n,3] x",
    "float[n,2] y, float[n,5] z",
    {
        "w0": (3, 7),
        "w1": (3, 11),
        "w2": (11, 7),
        "w3": (7, 11),
        "w5": (11, 2),
        "w6": (7, 5),
        "zero": i64(0),
        "limit": np.array(2),
        "trip": np.array(5),
    },
    LOOP
    + "h, all = Loop(trip, , h0) <body = round (int64 i, bool on, float[n,11] hi) => (bool on2, float[n,11] ho, float[n,7] e)\n"
    "  { b = MatMul(hi, w2) c = Add(b, a) e = Tanh(c) ho = MatMul(e, w3) on2 = Less(i, limit) }>\n"
    "y = MatMul(h, w5)\nf = ReduceSum<keepdims = 0>(all, zero)\nz = MatMul(f, w6)",
)
entry(
    "a loop that ends by what it computes",
    "float[n,3] x",
    "float[n,2] y, float[n,5] z",
    {
        "w0": (3, 7),
        "w1": (3, 11),
        "w2": (11, 7),
        "w3": (7, 11),
        "w5": (11, 2),
        "w6": (7, 5),
        "zero": i64(0),
        "limit": np.array(0.9, np.float32),
        "trip": np.array(5),
    },
    LOOP
    + "h, all = Loop(trip, , h0) <body = round (int64 i, bool on, float[n,11] hi) => (bool on2, float[n,11] ho, float[n,7] e)\n"
    "  { b = MatMul(hi, w2) c = Add(b, a) e = Tanh(c) ho = MatMul(e, w3) m = ReduceMin<keepdims = 0>(e) on2 = Less(m, limit) }>\n"
    "y = MatMul(h, w5)\nf = ReduceSum<keepdims = 0>(all, zero)\nz = MatMul(f, w6)",
)
entry(
    "a while loop over time",
    "float[n,t,3] x",
    "float[n,2] y",
    {
        "wx": (3, 33),
        "wh": (11, 33),
        "b": (33,),
        "w5": (11, 2),
        "zero": np.array(0.0, np.float32),
        "one": np.array(1, np.int32),
        "none": np.array(0, np.int32),
        "eleven": i64(11),
        "s0": i64(0),
        "s1": i64(1),
        "s2": i64(2),
        "e1": i64(11),
        "e2": i64(22),
        "e3": i64(33),
        "last": i64(-1),
        "far": i64(2**31 - 1),
        "unit": np.array(1.0, np.float32),
    },
    "v = Transpose<perm = [1, 0, 2]>(x)\nsizes = Shape(v)\nn = Slice(sizes, s1, s2)\nt0 = Slice(sizes, s0, s1)\n"
    "t1 = Cast<to = 6>(t0)\nt = Squeeze(t1, s0)\ntrip = Cast<to = 7>(t)\ngo = Less(none, t)\n"
    "k = Concat<axis = 0>(n, eleven)\nh0 = Expand(zero, k)\n"
    "time, h, length, all = Loop(trip, go, none, h0, t) <body = round (int64 i, bool on, int32 at, float[n,11] hi, int32 li)\n"
    "    => (bool on2, int32 at2, float[n,11] ho, int32 lo, float[n,11] e)\n"
    "  { a = Gather(v, at) p = MatMul(a, wx) q = Add(p, b) r = MatMul(hi, wh) at2 = Add(at, one) lo = Identity(li)\n"
    "    g1 = Cast<to = 1>(at2) g2 = Cast<to = 1>(li) g3 = Less(g1, g2) f1 = Cast<to = 1>(i) f2 = Cast<to = 1>(t)\n"
    "    f3 = Less(f1, f2) on2 = And(f3, g3) u1, u2, u3 = Split<axis = -1, num_outputs = 3>(q)\n"
    "    v1 = Slice(r, s0, e1, s1) v2 = Slice(r, e1, e2, s1) v3 = Slice(r, e2, e3, s1) z1 = Add(u1, v1) z2 = Sigmoid(z1)\n"
    "    r1 = Add(u2, v2) r2 = Sigmoid(r1) c1 = Mul(r2, v3) c2 = Add(u3, c1) c3 = Tanh(c2) k1 = Sub(unit, z2)\n"
    "    k2 = Mul(k1, c3) k3 = Mul(z2, hi) ho = Add(k2, k3) e = Identity(ho) }>\n"
    "d = Slice(all, last, far, s0)\nf = Squeeze(d, s0)\ny = MatMul(f, w5)",
)
entry(
    "a loop whose state grows",
    "float[n,3] x",
    "float[n,2] y",
    {"w0": (3, 7), "w1": (3, 7), "w2": (7, 7), "w3": (7, 11), "w4": (11, 7), "w5": (7, 2), "count": np.array(3), "go": np.array(True),
     "zero": i64(0)},
    LOOP + "h, s = Loop(count, go, h0, a) <body = round (int64 i, bool on, float[n,7] hi, float[m,7] si)\n"
    "    => (bool on2, float[n,7] ho, float[m2,7] so)\n"
    "  { on2 = Identity(on) b = MatMul(hi, w3) c = Relu(b) ho = MatMul(c, w4) so = Concat<axis = 0>(si, hi) }>\n"
    "d = ReduceSum<keepdims = 1>(s, zero)\ne = Add(h, d)\ny = MatMul(e, w5)",
)  # fmt: skip
for axis, shape in ((0, "t,n,5"), (1, "n,t,5")):
    entry(
        f"a cell over time along axis {axis}",
        f"float[{shape}] x",
        f"float[{shape.replace('5', '2')}] y",
        {"w0": (5, 7), "w1": (7, 11), "w2": (11, 11), "b2": (11,), "w3": (11, 2), "h0": (1, 11), "w4": (11, 13), "w5": (13, 11),
         "size": i64(1), "i": np.array(1 - axis), "eleven": i64(11), "zero": i64(0)},
        "a = MatMul(x, w0)\nb = Shape(x)\nc = Gather(b, i)\nd = Unsqueeze(c, zero)\ne = Concat<axis = 0>(d, eleven)\nhs = Expand(h0, e)\n"
        f"h, s = Scan<num_scan_inputs = 1, scan_input_axes = [{axis}], scan_output_axes = [{axis - 3}],\n"
        "  body = cell (float[n,11] hi, float[n,7] xi) => (float[n,11] ho, float[n,11] so)\n"
        "  { f = MatMul(xi, w1) g = MatMul(hi, w2) k = Add(f, g) l = Add(k, b2) m = Tanh(l)\n"
        "    w4 = Constant<value_int = 0>() p = MatMul(m, w4) q = Sigmoid(p) ho = MatMul(q, w5) so = Identity(ho) }>(hs, a)\n"
        "y = MatMul(s, w3)",
    )  # fmt: skip
entry(
    "a function with weights as arguments",
    "float[n,3] x",
    "float[n,2] y",
    {"w0": (3, 7), "b0": (7,), "w1": (7, 11), "b1": (11,), "w2": (11, 2), "b2": (2,)},
    "a = local.layer(x, w0, b0)\nb = local.layer(a, w1, b1)\ny = local.layer(b, w2, b2)\n---\n"
    '<domain: "local", opset_import: ["": 18]>\nlayer (x, w, b) => (y) { a = MatMul(x, w) c = Add(a, b) y = Tanh(c) }',
)
entry(
    "a function of another operator set",
    "float[n,3] x",
    "float[n,2] y, float[n,3] z",
    {"w0": (3, 7), "w1": (7, 11), "w2": (11, 2)},
    "a = MatMul(x, w0)\nb = Relu(a)\nc = MatMul(b, w1)\nd = Relu(c)\ny = MatMul(d, w2)\nz = local.act(x)\n---\n"
    '<domain: "local", opset_import: ["": 17]>\nact (x) => (y) { y = Tanh(x) }',
)
entry(
    "functions with constants inside",
    "float[n,7] x, bool flag",
    "float[n,7] y",
    {"w": (7, 11), "v": (11, 7), "k": (7, 7)},
    "a = local.block<slope = 0.3>(x)\n"
    "b = If(flag) <then_branch = yes () => (float[n,7] c) { c = local.block<slope = 0.1>(a) },\n"
    "  else_branch = no () => (float[n,7] w) { w = MatMul(a, k) }>\n"
    "y = Add(a, b)\n---\n"
    '<domain: "local", opset_import: ["": 18, "local": 1]>\nblock <slope> (x) => (y) {\n'
    "  w = Constant<value_int = 0>() v = Constant<value_int = 0>() a = MatMul(x, w) b = local.act<slope: float = @slope>(a) y = MatMul(b, v) }\n"
    '<domain: "local", opset_import: ["": 18]>\nact <slope> (x) => (y) { y = LeakyRelu<alpha: float = @slope>(x) }',
)

# Forms -------------------------------------------------------------------------------------------------------------

entry(
    "read inside a branch",
    "float[n,3] x, bool flag",
    "float[n,2] y",
    {"w1": (3, 7), "w2": (7, 11), "w3": (11, 2), "w4": (7, 2)},
    "a = MatMul(x, w1)\nb = MatMul(a, w2)\nc = MatMul(b, w3)\n"
    "d = If(flag) <then_branch = yes () => (float[n,7] p) { p = Relu(a) }, else_branch = no () => (float[n,7] r) { r = Neg(a) }>\n"
    "e = MatMul(d, w4)\ny = Add(c, e)",
)
entry(
    "a feature map is an output too",
    "float[n,3,4,4] x",
    "float[n,2,4,4] y, float[n,7,4,4] b",
    {"w0": (7, 3, 1, 1), "w1": (11, 7, 1, 1), "w2": (2, 11, 1, 1)},
    "a = Conv(x, w0)\nb = Relu(a)\nc = Conv(b, w1)\ny = Conv(c, w2)",
)

# Residual branches ---------------------------------------------------------------------------------------------------


def attention(x: str, y: str, tag: str) -> str:
    """One head over x, with weights of its own: q, k, v and o, numbered."""
    return (
        f"q{tag} = MatMul({x}, wq{tag})\nk{tag} = MatMul({x}, wk{tag})\nv{tag} = MatMul({x}, wv{tag})\n"
        f"kt{tag} = Transpose<perm = [0,2,1]>(k{tag})\nz{tag} = MatMul(q{tag}, kt{tag})\np{tag} = Softmax(z{tag})\n"
        f"o{tag} = MatMul(p{tag}, v{tag})\n{y} = MatMul(o{tag}, wo{tag})\n"
    )


def attention_weights(tag: str, width: int = 6) -> dict[str, tuple[int, ...]]:
    return {f"wq{tag}": (width, 5), f"wk{tag}": (width, 5), f"wv{tag}": (width, 7), f"wo{tag}": (7, width)}


def feed_forward(x: str, y: str, tag: str) -> str:
    return (
        f"u{tag} = MatMul({x}, up{tag})\nub{tag} = Add(u{tag}, bu{tag})\nr{tag} = Relu(ub{tag})\n"
        f"m{tag} = MatMul(r{tag}, down{tag})\n{y} = Add(m{tag}, bd{tag})\n"
    )


def feed_forward_weights(tag: str, width: int = 6, hidden: int = 11) -> dict[str, tuple[int, ...]]:
    return {f"up{tag}": (width, hidden), f"bu{tag}": (hidden,), f"down{tag}": (hidden, width), f"bd{tag}": (width,)}


entry(
    "pre-norm blocks",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {**attention_weights("0"), **attention_weights("1"), **feed_forward_weights("0"), **feed_forward_weights("1"),
     "g": (6,), "s": (6,), "head": (6, 2)},
    "n0 = LayerNormalization(x, g, s)\n" + attention("n0", "a0", "0") + "x1 = Add(x, a0)\nn1 = LayerNormalization(x1, g, s)\n"
    + feed_forward("n1", "f0", "0") + "x2 = Add(f0, x1)\nn2 = LayerNormalization(x2, g, s)\n" + attention("n2", "a1", "1")
    + "x3 = Add(x2, a1)\nn3 = LayerNormalization(x3, g, s)\n" + feed_forward("n3", "f1", "1")
    + "x4 = Add(x3, f1)\nn4 = LayerNormalization(x4, g, s)\ny = MatMul(n4, head)",
)  # fmt: skip
entry(
    "post-norm block, its sum an output",
    "float[n,t,6] x",
    "float[n,t,6] y, float[n,t,6] x2",
    {**attention_weights("0"), **feed_forward_weights("0"), "g0": (6,), "s0": (6,), "g1": (6,), "s1": (6,), "scale": (6,)},
    attention("x", "a0", "0") + "x1 = Add(a0, x)\nn1 = LayerNormalization(x1, g0, s0)\n" + feed_forward("n1", "f0", "0")
    + "f = Mul(f0, scale)\nx2 = Add(n1, f)\ny = LayerNormalization(x2, g1, s1)",
)  # fmt: skip
entry(
    "parallel blocks",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {**attention_weights("0"), **feed_forward_weights("0"), **attention_weights("1"), **feed_forward_weights("1"),
     "g0": (6,), "s0": (6,), "g1": (6,), "s1": (6,), "g2": (6,), "s2": (6,), "head": (6, 2)},
    "n0 = LayerNormalization(x, g0, s0)\n" + attention("n0", "a0", "0") + feed_forward("n0", "f0", "0")
    + "b0 = Add(a0, f0)\nx1 = Add(b0, x)\nn1 = LayerNormalization(x1, g1, s1)\n" + attention("n1", "a1", "1")
    + feed_forward("n1", "f1", "1") + "x2 = Sum(a1, x1, f1)\nn2 = LayerNormalization(x2, g2, s2)\ny = MatMul(n2, head)",
)  # fmt: skip
entry(
    "residual convolutions, with and without projection",
    "float[n,3,8,8] x",
    "float[n,2] y",
    {"w0": (5, 3, 3, 3), "b0": (5,), "w1": (7, 5, 3, 3), "w2": (5, 7, 3, 3), "b2": (5,), "w3": (11, 5, 3, 3), "b3": (11,),
     "w4": (13, 11, 3, 3), "b4": (13,), "g4": (13,), "s4": (13,), "m4": (13,), "var4": (13,), "w5": (13, 5, 1, 1), "head": (2, 13)},
    "a = Conv<pads = [1,1,1,1]>(x, w0, b0)\nb = Relu(a)\nc = Conv<pads = [1,1,1,1]>(b, w1)\nd = Relu(c)\n"
    "e = Conv<pads = [1,1,1,1]>(d, w2, b2)\nf = Add(e, b)\ng = Relu(f)\n"
    "h = Conv<pads = [1,1,1,1], strides = [2,2]>(g, w3, b3)\ni = Relu(h)\nj = Conv<pads = [1,1,1,1]>(i, w4, b4)\n"
    "k = BatchNormalization(j, g4, s4, m4, var4)\nl = Conv<strides = [2,2]>(g, w5)\nm = Add(l, k)\nn1 = Relu(m)\n"
    "o = GlobalAveragePool(n1)\np = Flatten(o)\ny = Gemm<transB = 1>(p, head)",
)  # fmt: skip
entry(
    "residuals in residuals",
    "float[n,3,4,4] x",
    "float[n,2,4,4] y",
    {"w0": (5, 3, 1, 1), **{f"w{k}": (7, 5, 3, 3) for k in (1, 3, 5)}, **{f"w{k}": (5, 7, 1, 1) for k in (2, 4, 6)},
     "fifth": np.array(0.2, np.float32), "w7": (5, 5, 1, 1), "head": (2, 5, 1, 1)},
    "a = Conv(x, w0)\nb = Conv<pads = [1,1,1,1]>(a, w1)\nc = Relu(b)\nd = Conv(c, w2)\ne = Mul(d, fifth)\nf = Add(a, e)\n"
    "g = Conv<pads = [1,1,1,1]>(f, w3)\nh = Relu(g)\ni = Conv(h, w4)\nj = Add(f, i)\nk = Conv(j, w7)\nl = Mul(k, fifth)\n"
    "m = Add(l, a)\no = Conv<pads = [1,1,1,1]>(m, w5)\np = Relu(o)\nq = Conv(p, w6)\nr = Add(m, q)\ny = Conv(r, head)",
)  # fmt: skip
entry(
    "fused sums and norms",
    "float[n,t,6] x",
    "float[n,t,2] y, float[n,t,6] last",
    {**attention_weights("0"), **feed_forward_weights("0"), **feed_forward_weights("1"), "g0": (6,), "s0": (6,), "b": (6,),
     "g1": (6,), "g2": (6,), "head": (6, 2)},
    attention("x", "a0", "0") + "n0, , , x1 = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(x, a0, g0, s0, b)\n"
    + feed_forward("n0", "f0", "0") + "n1, , , x2 = com.microsoft.SkipSimplifiedLayerNormalization(f0, x1, g1)\n"
    + feed_forward("n1", "f1", "1")
    + "n2, , , last = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.001>(f1, x2, g2)\ny = MatMul(n2, head)",
    ir=9,
)  # fmt: skip
entry(
    "fused post-norm",
    "float[n,t,6] x",
    "float[n,t,6] y",
    {**attention_weights("0"), **feed_forward_weights("0"), "g0": (6,), "s0": (6,), "g1": (6,), "s1": (6,)},
    attention("x", "a0", "0") + "n0 = com.microsoft.SkipLayerNormalization(a0, x, g0, s0)\n" + feed_forward("n0", "f0", "0")
    + "y = com.microsoft.SkipLayerNormalization(f0, n0, g1, s1)",
    opset=12,
)  # fmt: skip
entry(
    "branches that cache keys and values",
    "int64[n,t] ids, float[n,p,5] past0, float[n,p,7] past1, float[n,p,5] past2, float[n,p,7] past3",
    "float[n,t,13] y, float[n,u,5] now0, float[n,u,7] now1, float[n,u,5] now2, float[n,u,7] now3",
    {"table": (13, 6), **attention_weights("0"), **attention_weights("1"), **feed_forward_weights("0"), "g": (6,), "head": (6, 13)},
    "x = Gather(table, ids)\n"
    + "".join(
        f"n{k} = RMSNormalization({x}, g)\nq{k} = MatMul(n{k}, wq{k})\nnk{k} = MatMul(n{k}, wk{k})\nnv{k} = MatMul(n{k}, wv{k})\n"
        f"now{2 * k} = Concat<axis = 1>(past{2 * k}, nk{k})\nnow{2 * k + 1} = Concat<axis = 1>(past{2 * k + 1}, nv{k})\n"
        f"kt{k} = Transpose<perm = [0,2,1]>(now{2 * k})\ns{k} = MatMul(q{k}, kt{k})\np{k} = Softmax(s{k})\n"
        f"o{k} = MatMul(p{k}, now{2 * k + 1})\na{k} = MatMul(o{k}, wo{k})\n{y} = Add({x}, a{k})\n"
        for k, x, y in ((0, "x", "x1"), (1, "x2", "x3"))
        for _ in (0,)
    ).replace("n1 = RMS", feed_forward("x1", "f0", "0") + "x2 = Add(x1, f0)\nn1 = RMS")
    + "y = MatMul(x3, head)",
    opset=23,
)  # fmt: skip
entry(
    "one layer applied twice, and what is no branch",
    "float[n,t,6] x, float[n,t,6] other",
    "float[n,t,6] y, float[n,t,11] hidden",
    {**feed_forward_weights("0"), **feed_forward_weights("1"), "up2": (6, 11), "down2": (11, 6), "up3": (6, 6), "place": (1, 1, 6)},
    feed_forward("x", "f0", "0") + "x1 = Add(x, f0)\nv1 = MatMul(x1, up0)\nt1 = Relu(v1)\nv2 = MatMul(t1, down0)\nx2 = Add(x1, v2)\n"
    + "p = Add(x2, place)\nhidden = MatMul(p, up2)\nh = MatMul(hidden, down2)\nx3 = Add(p, h)\ne = MatMul(other, up3)\nx4 = Add(x3, e)\n"
    + "d = Mul(x4, e)\n" + feed_forward("d", "f1", "1") + "y = Add(f1, d)",
)  # fmt: skip
entry(
    "attention over every position of an image of any size",
    "float[n,3,h,w] x",
    "float[n,2,h,w] y",
    {"w1": (10, 3, 1, 1), "b1": (10,), "wqkv": (21, 10, 1, 1), "w2": (2, 7, 1, 1), "flat": i64(0, 0, -1)},
    "h0 = Conv(x, w1, b1)\na = Conv(h0, wqkv)\nc = Reshape(a, flat)\nq, k, v = Split<axis = 1, num_outputs = 3>(c)\n"
    "qt = Transpose<perm = [0,2,1]>(q)\ns = MatMul(qt, k)\np = Softmax(s)\npt = Transpose<perm = [0,2,1]>(p)\n"
    "o = MatMul(v, pt)\no1 = Shape<start = 2>(h0)\nnc = Shape<end = 2>(o)\nback = Concat<axis = 0>(nc, o1)\n"
    "z = Reshape(o, back)\ny = Conv(z, w2)",
)
entry(
    "weight norm in the graph",
    "float[n,3,5] x",
    "float[n,2,6] y",
    {"w1": (11, 3, 1), "b1": (11,), "v": (13, 11, 3), "g": (13, 1, 1), "b2": (13,), "u": (13, 7, 2), "f": (13, 1, 1),
     "two": f32(2), "tail": i64(1, 2), "w3": (2, 7, 1)},
    "h = Conv(x, w1, b1)\na = Sigmoid(h)\nlength = ReduceL2<axes = [1,2], keepdims = 1>(v)\nvn = Div(v, length)\nw2 = Mul(g, vn)\n"
    "c = Conv<pads = [1,1]>(a, w2, b2)\nd = Sigmoid(c)\nsquares = Pow(u, two)\nsum = ReduceSum<keepdims = 1>(squares, tail)\n"
    "root = Sqrt(sum)\nun = Div(u, root)\nwu = Mul(un, f)\ne0 = ConvTranspose(d, wu)\ne = Relu(e0)\ny = Conv(e, w3)",
    opset=17,
)  # fmt: skip
entry(
    "weight standardisation in the graph, spelt out and by batch norm",
    "float[n,3,5,5] x",
    "float[n,2] y",
    {"w1": (11, 3, 1, 1), "b1": (11,), "w2": (13, 11, 3, 3), "gain": (13, 1, 1, 1), "b2": (13,), "tiny": f32(1e-3),
     "w3": (7, 13, 1, 1), "rows": i64(1, 7, 13), "one": (7,), "zero": np.zeros(7, np.float32), "var": (7,),
     "back": i64(7, 13, 1, 1), "scale": (7, 1, 1, 1), "w4": (7, 2)},
    "h = Conv(x, w1, b1)\na = Sigmoid(h)\nm = ReduceMean<axes = [1,2,3]>(w2)\nd = Sub(w2, m)\nsq = Mul(d, d)\n"
    "v0 = ReduceMean<axes = [1,2,3]>(sq)\nv1 = Add(v0, tiny)\ns = Sqrt(v1)\nn2 = Div(d, s)\nw2s = Mul(n2, gain)\n"
    "c = Conv<pads = [1,1,1,1]>(a, w2s, b2)\ne = Sigmoid(c)\nr = Reshape(w3, rows)\n"
    "bn, rm, rv = BatchNormalization<training_mode = 1>(r, one, zero, zero, var)\nw30 = Reshape(bn, back)\nw3s = Mul(w30, scale)\n"
    "k = Conv(e, w3s)\nl = Sigmoid(k)\np0 = GlobalAveragePool(l)\np = Flatten(p0)\ny = MatMul(p, w4)",
    opset=17,
)  # fmt: skip
entry(
    "slopes of heads computed from their number",
    "float[n,t,6] x",
    "float[n,t,2] y",
    {"wq": (6, 15), "bq": (15,), "wk": (6, 15), "wv": (6, 15), "bv": (15,), "wo": (15, 2), "split": i64(0, 0, 3, 5),
     "join": i64(0, 0, 15), "scale": f32(0.4), "none": np.array(0), "count": np.array(3), "step": np.array(1),
     "half": np.array(0.5, np.float32), "last": i64(1, 2)},
    "q2 = MatMul(x, wq)\nq0 = Add(q2, bq)\nk0 = MatMul(x, wk)\nv2 = MatMul(x, wv)\nv0 = Add(v2, bv)\n"
    "r0 = Range(none, count, step)\nr1 = Cast<to = 1>(r0)\nr2 = Add(r1, half)\nslopes = Unsqueeze(r2, last)\n"
    + ATTENTION.replace("Softmax(s1)", "Mul(s1, slopes)"),
)  # fmt: skip
entry(
    "heads folded into padded windows",
    "float[n,3,5,5] x",
    "float[n,5,5,4] y",
    {"w0": (6, 3, 1, 1), "b0": (6,), "border": i64(0, 0, 0, 0, 0, 1, 1, 0), "cells": i64(-1, 2, 3, 2, 3, 6),
     "windows": i64(-1, 9, 6), "wq": (6, 10), "bq": (10,), "wk": (6, 10), "wv": (6, 10), "bv": (10,),
     "split": i64(-1, 9, 2, 5), "fold": i64(-1, 9, 5), "unfold": i64(-1, 2, 9, 5), "join": i64(-1, 9, 10), "wo": (10, 4),
     "cells4": i64(-1, 2, 2, 3, 3, 4), "image": i64(-1, 6, 6, 4), "start": i64(0, 0),
     "end": i64(5, 5), "space": i64(1, 2)},
    "h0 = Conv(x, w0, b0)\nh1 = Transpose<perm = [0,2,3,1]>(h0)\nh2 = Pad(h1, border)\nh3 = Reshape(h2, cells)\n"
    "h4 = Transpose<perm = [0,1,3,2,4,5]>(h3)\nh = Reshape(h4, windows)\n"
    + "".join(
        f"{p}0 = MatMul(h, w{p})\n{f'{p}1 = Add({p}0, b{p})' if p != 'k' else f'{p}1 = Identity({p}0)'}\n"
        f"{p}2 = Reshape({p}1, split)\n{p}3 = Transpose<perm = [0,2,1,3]>({p}2)\n{p} = Reshape({p}3, fold)\n"
        for p in "qkv"
    )
    + "kt = Transpose<perm = [0,2,1]>(k)\ns = MatMul(q, kt)\np = Softmax(s)\no0 = MatMul(p, v)\no1 = Reshape(o0, unfold)\n"
    "o2 = Transpose<perm = [0,2,1,3]>(o1)\no3 = Reshape(o2, join)\no4 = MatMul(o3, wo)\no5 = Reshape(o4, cells4)\n"
    "o6 = Transpose<perm = [0,1,3,2,4,5]>(o5)\no7 = Reshape(o6, image)\ny = Slice(o7, start, end, space)",
)  # fmt: skip
