"""Repair of every family of linear operators: what is left takes over what went, as exactly as it can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxprune import plugin, prune
from onnxprune.allocate import sites_of
from onnxprune.analysis import Analysis
from onnxprune.calibrate import collect
from onnxprune.evidence import evidence
from onnxprune.flow import Flow, Sessions
from onnxprune.parts import Part
from onnxprune.reading import serialized
from onnxprune.recipe import Options
from onnxprune.recovery import Recovery
from onnxprune.sites import Site
from onnxprune.types import Group, Plan
from onnxprune.worker import Worker

ort.set_default_logger_severity(4)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(seconds=60) as made:
        yield made


@dataclass(frozen=True)
class Net:
    """A model, what it reads, and a weight of which some positions along an axis are to go."""

    inputs: str
    body: str
    weights: dict[str, np.ndarray]
    x: tuple[int, ...]
    slice: tuple[str, int]
    gone: tuple[int, ...]
    feeds: int = 24
    rank: int = 0

    def feed(self, seed: int) -> dict[str, np.ndarray]:
        """Normal numbers; with a `rank` nearly in a space of so many dimensions."""
        x = np.random.default_rng([7, seed]).standard_normal(self.x)
        if self.rank:
            mix = np.random.default_rng(8).standard_normal((self.rank, self.x[-1]))
            x = x[..., : self.rank] @ mix + 0.1 * x
        return {"x": x.astype(np.float32)}


def weight(seed: int, *shape: int) -> np.ndarray:
    fan = shape[-1] if len(shape) > 1 else 4
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


def save(net: Net, folder: Path, outputs: str = "float y") -> Path:
    domains = '["" : 18, "com.microsoft" : 1]'
    text = f"<ir_version: 8, opset_import: {domains}> g ({net.inputs}) => ({outputs}) {{ {net.body} }}"
    model = parser.parse_model(text)
    for name, array in net.weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def analysed(net: Net, folder: Path) -> Analysis:
    return Analysis(save(net, folder), remove=("all",))


def run(model: onnx.ModelProto | bytes | str, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options)
    return np.concatenate([session.run(None, feed)[0].reshape(-1) for feed in feeds])


def group_of(analysis: Analysis, initializer: str, axis: int) -> Group:
    (found,) = {
        group.id: group
        for group in analysis.groups
        for member in group.members
        if (member.initializer, member.axis) == (initializer, axis)
    }.values()
    return found


def errors(net: Net, how: str, folder: Path, worker: Worker) -> tuple[float, float]:
    """Relative errors on fresh inputs of what is pruned, and of what is repaired."""
    analysis = analysed(net, folder)
    group = group_of(analysis, *net.slice)
    keep = np.ones(len(group.units), np.bool_)
    keep[list(net.gone)] = False
    plan = Plan({group.id: keep})
    pruned = analysis.rewrite(plan)
    options = Options(ratio=0.5, calibration="given", reconstruct=how)
    result = Recovery(analysis, [net.feed(k) for k in range(net.feeds)], options, worker).repair(plan, pruned)
    fresh = [net.feed(1000 + k) for k in range(8)]
    wanted = run(str(folder / "m.onnx"), fresh)
    found = [run(serialized(model).SerializeToString(), fresh) for model in (pruned, result.model)]
    assert result.names, result.warnings
    naive, left = (float(np.linalg.norm(one - wanted) / np.linalg.norm(wanted)) for one in found)
    return naive, left


def dependent(first: np.ndarray, axis: int, gone: tuple[int, ...]) -> np.ndarray:
    """The weight with these slices as sums of the others."""
    moved = np.moveaxis(first.copy(), axis, 0)
    rest = np.delete(np.arange(len(moved)), gone)
    mix = np.random.default_rng(5).standard_normal((len(gone), len(rest))) / np.sqrt(len(rest))
    moved[list(gone)] = np.tensordot(mix, moved[rest], axes=1)
    return np.moveaxis(moved, 0, axis)


# Inputs that go ------------------------------------------------------------------------------------------------------

GONE = (1, 4, 6)


def convolved(attributes: str, kernel: tuple[int, ...], outputs: int, groups: int, size: tuple[int, ...]) -> Net:
    """A convolution of kernels of one, some of whose channels are sums of others, and a transposed one."""
    channels = 8
    one = weight(1, channels, 6, *[1] * len(kernel))
    gone = GONE if groups == 1 else (1, 2)
    body = f"h = Conv(x, w0)\ny = ConvTranspose{attributes}(h, w, b)"
    weights = {
        "w0": dependent(one, 0, GONE),
        "w": weight(2, channels, outputs, *kernel),
        "b": weight(3, outputs * groups),
    }
    shape = (4, 6, *size)
    return Net(f"float[n,6,{','.join(map(str, size))}] x", body, weights, shape, ("w0", 0), gone)


TRANSPOSED = {
    "1-D": convolved("", (3,), 5, 1, (9,)),
    "1-D, uneven": convolved("<strides = [3], pads = [2,0], output_padding = [1]>", (4,), 5, 1, (9,)),
    "2-D, strides": convolved("<strides = [2,2]>", (2, 2), 5, 1, (5, 4)),
    "2-D, dilations, pads": convolved("<dilations = [2,1], pads = [1,0,2,1], strides = [1,2]>", (3, 2), 5, 1, (5, 4)),
    "2-D, auto pad": convolved('<auto_pad = "SAME_UPPER", strides = [2,3]>', (3, 4), 5, 1, (5, 4)),
    "3-D": convolved("<strides = [1,2,1], output_padding = [0,1,0]>", (2, 2, 1), 3, 1, (3, 4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPOSED)
def test_channels_that_are_sums_of_others_are_no_loss_to_a_transposed_convolution(
    name: str, tmp_path: Path, worker: Worker
) -> None:
    naive, left = errors(TRANSPOSED[name], "lsq,ridge=1e-9", tmp_path, worker)
    assert naive > 0.1
    assert left < 1e-5


def stacked(text: str, read: str, shape: tuple[int, ...], inner: int) -> Net:
    """A product whose columns are sums of others, and a stack of matrices."""
    weights = {"w0": dependent(weight(1, 6, 8), 1, GONE), "w": weight(2, *shape), "axis": np.array([1])}
    body = f"h0 = MatMul(x, w0)\n{read}\ny = {text}"
    return Net("float[n,7,6] x", body, weights, (5, 7, 6), ("w0", 1), GONE)


STACKS = {
    "one input for all": stacked("MatMul(h, w)", "h = Unsqueeze(h0, axis)", (3, 8, 5), 1),
    "Einsum": stacked('Einsum<equation = "btd,dhk->bhtk">(h0, w)', "h = Identity(h0)", (8, 3, 5), 0),
    "Einsum with dots": stacked('Einsum<equation = "...d,edf->...ef">(h0, w)', "h = Identity(h0)", (3, 8, 5), 0),
    "from the left": stacked("MatMul(w, h)", "h = Transpose<perm = [0,2,1]>(h0)", (5, 8), 0),
    "fused": stacked("com.microsoft.FusedMatMul<transB = 1>(h0, w)", "h = Identity(h0)", (5, 8), 0),
}


@pytest.mark.parametrize("name", STACKS)
def test_columns_that_are_sums_of_others_are_no_loss_to_a_stack(name: str, tmp_path: Path, worker: Worker) -> None:
    naive, left = errors(STACKS[name], "lsq,ridge=1e-9", tmp_path, worker)
    assert naive > 0.1
    assert left < 1e-5


def experts(down: str) -> Net:
    """Each expert has neurons of its own, of which those that go are sums of others."""
    up = np.stack([dependent(weight(k, 6, 8), 1, GONE) for k in range(3)])
    body = f"e = Unsqueeze(x, axis)\nh = MatMul(e, up)\ny = {down}"
    weights = {"up": up, "w": weight(9, 3, 8, 5), "axis": np.array([1])}
    return Net("float[n,7,6] x", body, weights, (5, 7, 6), ("up", 2), GONE)


@pytest.mark.parametrize("down", ["MatMul(h, w)", 'Einsum<equation = "betf,efd->betd">(h, w)'])
def test_each_expert_takes_over_what_its_own_neurons_did(down: str, tmp_path: Path, worker: Worker) -> None:
    naive, left = errors(experts(down), "lsq,ridge=1e-9", tmp_path, worker)
    assert naive > 0.1
    assert left < 1e-5


def recurrent(
    op: str, attributes: str = "", *, state: bool = False, lengths: bool = False, hidden: bool = False
) -> Net:
    """Columns of x, or hidden units, some of which are sums (or copies) of others."""
    count, units = GATES[op], 7
    both = "bidirectional" in attributes
    d = 2 if both else 1
    w, r, b = weight(2, d, count * units, 8), weight(3, d, count * units, units), weight(4, d, 2 * count * units)
    start = weight(6, d, 3, units)
    if hidden:
        for array in (w, r, b):
            parted = array.reshape(d, -1, units, *array.shape[2:])
            parted[:, :, 5] = parted[:, :, 2]
        start[:, :, 5] = start[:, :, 2]
    weights = {"w0": dependent(weight(1, 6, 8), 1, GONE), "w": w, "r": r, "b": b, "back": np.array([0, 0, -1])}
    weights |= {"out": weight(5, d * units, 4)}
    if state:
        weights["start"] = start
    if lengths:
        weights["ends"] = np.array([4, 6, 1], np.int32)
    body = (
        f"h = MatMul(x, w0)\na = {op}<hidden_size = {units}{attributes}>(h, w, r, b, {'ends' if lengths else ''}, "
        f"{'start' if state else ''})\nc = Transpose<perm = [0,2,1,3]>(a)\nd = Reshape(c, back)\ny = MatMul(d, out)"
    )
    where = ("r", 2) if hidden else ("w0", 1)
    return Net("float[6,3,6] x", body, weights, (6, 3, 6), where, (5,) if hidden else GONE, feeds=64)


VARIANTS: dict[str, dict[str, object]] = {
    "": {},
    ", forward, state": {"state": True},
    ", reverse, state": {"attributes": ', direction = "reverse"', "state": True},
    ", both": {"attributes": ', direction = "bidirectional"'},
    ", both, state, lengths": {"attributes": ', direction = "bidirectional"', "state": True, "lengths": True},
    ", reverse, lengths": {"attributes": ', direction = "reverse"', "lengths": True},
}
RECURRENT = [(op, name) for op in GATES for name in VARIANTS] + [("GRU linear", name) for name in VARIANTS]


def variant(op: str, name: str, **more: bool) -> Net:
    given = dict(VARIANTS[name])
    attributes = str(given.pop("attributes", ""))
    if op == "GRU linear":
        attributes += ", linear_before_reset = 1"
    return recurrent(op.split()[0], attributes, **given, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("op", "name"), RECURRENT)
def test_inputs_that_are_sums_of_others_are_no_loss_to_a_recurrence(
    op: str, name: str, tmp_path: Path, worker: Worker
) -> None:
    naive, left = errors(variant(op, name), "lsq,ridge=1e-9", tmp_path, worker)
    assert naive > 0.05
    assert left < 1e-5


@pytest.mark.parametrize("op", GATES)
def test_a_recurrence_of_which_only_the_last_state_is_read(op: str, tmp_path: Path, worker: Worker) -> None:
    net = recurrent(op, hidden=True)
    body = f"h = MatMul(x, w0)\n, last = {op}<hidden_size = 7>(h, w, r, b)\ny = MatMul(last, out)"
    naive, left = errors(replace(net, body=body), "lsq,ridge=1e-9", tmp_path, worker)
    assert naive > 0.01
    assert left < 1e-5


@pytest.mark.parametrize(("op", "name"), RECURRENT)
def test_a_hidden_unit_that_is_there_twice_is_no_loss(op: str, name: str, tmp_path: Path, worker: Worker) -> None:
    naive, left = errors(variant(op, name, hidden=True), "lsq,ridge=1e-9", tmp_path, worker)
    assert naive > 0.01
    assert left < 1e-5


def attention(bias: bool, widths: str = "", bottom: str = "") -> Net:
    total = 8 + 8 + 6 if widths else 24
    weights = {"w0": dependent(weight(1, 6, 8), 1, GONE), "w": weight(2, 8, total), "b": weight(3, total)}
    weights["wo"] = weight(4, 6 if widths else 8, 5)
    text = f"com.microsoft.Attention<num_heads = 2{widths}>(h, w, {'b' if bias else ''})"
    return Net(
        "float[n,7,6] x", f"h = MatMul(x, w0)\na = {text}\ny = MatMul(a, wo)", weights, (5, 7, 6), ("w0", 1), GONE
    )


@pytest.mark.parametrize(("bias", "widths"), [(True, ""), (True, ", qkv_hidden_sizes = [8,8,6]")])
def test_inputs_that_are_sums_of_others_are_no_loss_to_attention(
    bias: bool, widths: str, tmp_path: Path, worker: Worker
) -> None:
    naive, left = errors(attention(bias, widths), "lsq,ridge=1e-9", tmp_path, worker)
    assert naive > 0.05
    assert left < 1e-5


# Outputs that go, and those behind them ------------------------------------------------------------------------------


def behind(op: str, weights: dict[str, np.ndarray], where: tuple[str, int], gone: tuple[int, ...]) -> Net:
    """A layer that loses some units, the operator in the middle of which the input is now another, and a last one."""
    body = f"h0 = MatMul(x, w0)\nh1 = Add(h0, b0)\nh = Relu(h1)\n{op}\ny = MatMul(s, w9)"
    weights = {"w0": weight(1, 6, 16), "b0": weight(2, 16), **weights}
    return Net("float[n,7,6] x", body, weights, (6, 7, 6), where, gone, feeds=48, rank=3)


NORM = {"g": weight(20, 10) + 1, "shift": weight(21, 10), "mean": weight(22, 10), "var": weight(23, 10) ** 2 + 0.5}
AXIS = {"axis": np.array([1]), "apart": np.array([0, 0, 4, 4]), "flat": np.array([0, 0, -1])}
LOST = (0, 3, 5, 8, 9, 13)
MIDDLE = {
    "ConvTranspose, BatchNormalization": behind(
        "t = Transpose<perm = [0,2,1]>(h)\nc = ConvTranspose<strides = [2]>(t, w, b)\n"
        "n = BatchNormalization(c, g, shift, mean, var)\nr = Relu(n)\ns = Transpose<perm = [0,2,1]>(r)",
        {"w": weight(41, 16, 10, 3), "b": weight(5, 10), **NORM, "w9": weight(6, 10, 3)}, ("w0", 1), LOST,
    ),
    "grouped ConvTranspose": behind(
        "t = Transpose<perm = [0,2,1]>(h)\nc = ConvTranspose<group = 2, pads = [1,0]>(t, w)\n"
        "n = BatchNormalization(c, g, shift, mean, var)\nr = Relu(n)\ns = Transpose<perm = [0,2,1]>(r)",
        {"w": weight(4, 16, 5, 3), **NORM, "w9": weight(6, 10, 3)}, ("w0", 1), (0, 3, 5),
    ),
    "a sum of grouped convolutions": behind(
        "t = Transpose<perm = [0,2,1]>(h)\nc = Conv<group = 2, pads = [1,1]>(t, w, b)\n"
        "d = Conv<group = 2>(t, u)\ne = Add(c, d)\nr = Relu(e)\ns = Transpose<perm = [0,2,1]>(r)",
        {"w": weight(4, 10, 8, 3), "u": weight(7, 10, 8, 1), "b": weight(5, 10), "w9": weight(6, 10, 3)},
        ("w0", 1), (0, 3, 5),
    ),
    "Conv, padded to the same size": behind(
        't = Transpose<perm = [0,2,1]>(h)\nc = Conv<auto_pad = "SAME_UPPER", strides = [2]>(t, w, b)\nr = Relu(c)\n'
        "s = Transpose<perm = [0,2,1]>(r)",
        {"w": weight(4, 10, 16, 4), "b": weight(5, 10), "w9": weight(6, 10, 3)}, ("w0", 1), LOST,
    ),
    "FusedConv with a sum": behind(
        't = Transpose<perm = [0,2,1]>(h)\nz = Conv(t, u)\nc = com.microsoft.FusedConv<activation = "Relu", '
        "pads = [1,1]>(t, w, b, z)\ns = Transpose<perm = [0,2,1]>(c)",
        {"w": weight(4, 10, 16, 3), "b": weight(5, 10), "u": weight(7, 10, 16, 1), "w9": weight(6, 10, 3)},
        ("w0", 1), LOST,
    ),
    "FusedGemm": behind(
        'f = ReduceMean<keepdims = 0>(h, axis)\ns = com.microsoft.FusedGemm<transB = 1, activation = "Relu">(f, w, b)',
        {"w": weight(4, 10, 16), "b": weight(5, 10), "w9": weight(6, 10, 3), **AXIS}, ("w0", 1), LOST,
    ),
    "experts": behind(
        "e = Unsqueeze(h, axis)\na = MatMul(e, w)\nc = Add(a, b)\nd = Relu(c)\nf = MatMul(d, u)\n"
        "s = ReduceMean<keepdims = 0>(f, axis)",
        {"w": weight(4, 3, 16, 10), "b": weight(5, 3, 1, 10), "u": weight(7, 3, 10, 8), "w9": weight(6, 8, 3), **AXIS},
        ("w0", 1), LOST,
    ),
    "experts that lose neurons": behind(
        "e = Unsqueeze(h, axis)\na = MatMul(e, w)\nc = Add(a, b)\nd = Relu(c)\nf = MatMul(d, u)\n"
        "s = ReduceMean<keepdims = 0>(f, axis)",
        {"w": weight(4, 3, 16, 10), "b": weight(5, 3, 1, 10), "u": weight(7, 3, 10, 8), "w9": weight(6, 8, 3), **AXIS},
        ("w", 2), (0, 3, 5),
    ),
    "Attention": behind(
        "s = com.microsoft.Attention<num_heads = 2>(h, w, b)",
        {"w": weight(4, 16, 24), "b": weight(5, 24), "w9": weight(6, 8, 3)}, ("w0", 1), LOST,
    ),
    **{
        f"{op}{more}": behind(
            "t = Transpose<perm = [1,0,2]>(h)\n"
            f'a = {op}<hidden_size = 9, direction = "bidirectional"{more}>(t, w, r, b)\n'
            "c = Transpose<perm = [2,0,1,3]>(a)\ns = Reshape(c, flat)",
            {"w": weight(4, 2, k * 9, 16), "r": weight(5, 2, k * 9, 9), "b": weight(6, 2, 2 * k * 9), **AXIS,
             "w9": weight(7, 18, 3)},
            ("w0", 1), LOST,
        )
        for op, k in GATES.items()
        for more in ("", *([", linear_before_reset = 1"] if op == "GRU" else []))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MIDDLE)
def test_repair_of_whole_nets(name: str, tmp_path: Path, worker: Worker) -> None:
    naive, left = errors(MIDDLE[name], "sequential", tmp_path, worker)
    assert naive > 0.1
    assert left < (0.5 if "grouped" in name else 0.3) * naive  # groups leave less to fit with


@pytest.mark.parametrize("how", ["lsq", "obs-struct", "obs-block", "bias-comp", "mask-tune", "admm", "obspa"])
@pytest.mark.parametrize("name", ["ConvTranspose, BatchNormalization", "experts", "LSTM", "GRU", "Attention"])
def test_every_way_to_repair_knows_every_family(name: str, how: str, tmp_path: Path, worker: Worker) -> None:
    naive, left = errors(MIDDLE[name], how, tmp_path, worker)
    assert left < naive


# Sites and readers ---------------------------------------------------------------------------------------------------


def names(net: Net, folder: Path, stays: tuple[str, ...] = ()) -> dict[str, Site]:
    """The sites of a model of which nothing goes."""
    analysis = analysed(net, folder)
    found = sites_of(analysis, Plan({}), analysis.rewrite(Plan({})), stays)
    return {site.value: site for site in found}


def test_sums_inside_of_recurrent_operators(tmp_path: Path) -> None:
    """What a reset gate does to the state is only known where it is a sigmoid; what a user wants to keep is no site."""
    assert [*names(recurrent("LSTM"), tmp_path)] == ["h", "a gates", "y"]
    assert [*names(recurrent("LSTM"), tmp_path, ("r",))] == ["h", "y"]
    assert [*names(recurrent("GRU"), tmp_path)] == ["h", "a gates", "a candidate", "y"]
    assert [*names(recurrent("GRU", ', activations = ["HardSigmoid", "Tanh"]'), tmp_path)] == ["h", "a gates", "y"]
    apart = names(recurrent("GRU", ", linear_before_reset = 1"), tmp_path)
    assert [*apart] == ["h", "a gates", "a candidate of the input", "a candidate of the state", "y"]
    assert names(recurrent("RNN", ', activations = ["Relu"]'), tmp_path)["a gates"].bounds == (0.0, np.inf)
    assert names(recurrent("RNN"), tmp_path)["a gates"].bounds == (-np.inf, np.inf)


def inside(net: Net, folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """({site: what its operators make, [n, t, d, gates, hidden]}, state before each step, output), one feed."""
    model = analysed(net, folder).rewrite(Plan({}))
    sites = [site for site in names(net, folder).values() if not site.dense]
    wanted = {name for site in sites for name in site.reads}
    flow = Flow(model, [net.feed(0)], Sessions(), wanted | {"a"})
    values = {name: arrays[0] for name, arrays in zip(wanted, flow.values(list(wanted)), strict=True)}
    y = flow.values(["a"])[0][0].transpose(2, 0, 1, 3)
    n, t, d, hidden = y.shape
    found, state = {}, y
    for site in sites:
        total = np.zeros((n * t, d * hidden * len(site.operators[0].layout.chosen)), np.float32)  # type: ignore[attr-defined]
        for operator in site.operators:
            source = operator.source
            x = values[source] if isinstance(source, str) else source.of(values, flow.array)
            state = x if not isinstance(source, str) and not source.reset else state
            total = total + Part(flow, operator, operator.layout.rows(x, np.arange(n * t))).output()
        found[site.value] = total.reshape(n, t, d, -1, hidden)
    return found, state, y


@pytest.mark.parametrize(("op", "name"), RECURRENT)
def test_what_activations_get_makes_the_output(op: str, name: str, tmp_path: Path) -> None:
    net = variant(op, name)
    found, state, y = inside(net, tmp_path)
    gates = found["a gates"]
    ends = net.weights.get("ends", np.full(3, 6))
    open_ = 1 / (1 + np.exp(-gates))
    if op == "RNN":
        made = np.tanh(gates[:, :, :, 0])
    elif op == "LSTM":
        made = np.zeros_like(y)
        fresh, (enter, leave, keep) = np.tanh(gates[:, :, :, 3]), np.moveaxis(open_[:, :, :, :3], 3, 0)
        for k, d in np.ndindex(y.shape[0], y.shape[2]):
            cell = np.zeros(y.shape[3], np.float32)
            back = "reverse" in name or d == 1
            for step in range(ends[k])[:: -1 if back else 1]:
                cell = keep[k, step, d] * cell + enter[k, step, d] * fresh[k, step, d]
                made[k, step, d] = leave[k, step, d] * np.tanh(cell)
    else:
        update, reset = np.moveaxis(open_, 3, 0)
        if op == "GRU":
            fresh = np.tanh(found["a candidate"][:, :, :, 0])
        else:
            parts = [found[f"a candidate of the {which}"][:, :, :, 0] for which in ("input", "state")]
            fresh = np.tanh(parts[0] + reset * parts[1])
        made = (1 - update) * fresh + update * state
    for k, end in enumerate(ends):
        np.testing.assert_allclose(made[k, :end], y[k, :end], rtol=1e-4, atol=1e-5)


def test_sums_inside_of_fused_operators(tmp_path: Path) -> None:
    found = names(MIDDLE["FusedConv with a sum"], tmp_path)
    assert found["c inside"].rest == ("z",)
    assert found["c inside"].bounds == (0.0, np.inf)
    assert found["z"].dense == "z"
    assert not found["c inside"].dense


def test_criteria_see_what_recurrences_and_transposed_convolutions_read(tmp_path: Path, worker: Worker) -> None:
    def readers(net: Net) -> tuple[dict[str, plugin.Reader], Group]:
        analysis = analysed(net, tmp_path)
        feeds = [net.feed(k) for k in range(net.feeds)]
        group = group_of(analysis, *net.slice)
        model = analysis.prepared.model
        seen = evidence(analysis, [group], 0, lambda wanted: collect(worker, model, feeds, wanted), 1 << 28)
        return {reader.node: reader for reader in seen.readers(group)}, group

    net = recurrent("GRU", ', direction = "bidirectional"', hidden=True)
    found, group = readers(net)
    assert set(found) == {"a", "y"}
    assert found["a"].weight.shape == (7, 2 * 3 * 7)
    np.testing.assert_allclose(found["a"].weight[4], net.weights["r"][:, :, 4].reshape(-1), rtol=1e-6)
    text = save(net, tmp_path)
    model = onnx.load(text)
    model.graph.output.append(onnx.ValueInfoProto(name="a"))
    session = ort.InferenceSession(model.SerializeToString())
    states = np.concatenate([session.run(["a"], net.feed(k))[0].reshape(-1, 7) for k in range(net.feeds)])
    np.testing.assert_allclose(found["a"].mean_square, (states.astype(np.float64) ** 2).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["a"].uncentred, states.T @ states / len(states), rtol=1e-2, atol=1e-4)
    found, group = readers(TRANSPOSED["2-D, strides"])
    assert found["y"].weight.shape == (8, 5 * 4)
    assert found["y"].columns.shape == (len(group.units), 1)
    assert np.isfinite(found["y"].energy())


def test_plans_are_tried_with_recurrences_in_them(tmp_path: Path) -> None:
    """Several groups, so that trials remember what the dense model has."""
    net = MIDDLE["GRU"]
    np.savez(tmp_path / "c.npz", x=np.concatenate([net.feed(k)["x"] for k in range(20)]))
    path, out = save(net, tmp_path), tmp_path / "s.onnx"
    result = prune(path, out, target={"macs": "0.6"}, calibration=str(tmp_path / "c.npz"), measure=False, no_cache=True)
    assert {"w", "r", "b"} <= set(result.report.repaired)
    error = {}
    for how in ("none", "sequential"):
        given = {"reconstruct": how, "criterion": "mag", "allocate": "uniform", "force": True, "measure": False}
        prune(path, out, target={"macs": "0.6"}, calibration=str(tmp_path / "c.npz"), **given)
        fresh = [net.feed(1000 + k) for k in range(8)]
        wanted = run(str(path), fresh)
        error[how] = float(np.linalg.norm(run(str(out), fresh) - wanted) / np.linalg.norm(wanted))
    assert error["sequential"] < 0.3 * error["none"]
