"""Repair of weights with several readers: one weight, fitted on what all of them read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from test_recovery import run, save
from test_repair import built, found, whole

from onnxprune.sites import Site, Visit, find_sites, visits

ort.set_default_logger_severity(4)


def branch(x: str, t: int) -> str:
    return f"""
    a{t} = Conv<pads = [1,1,1,1]>({x}, w0, b0) p{t} = Relu(a{t})
    c{t} = Conv<pads = [1,1,1,1], strides = [2,2]>(p{t}, w1, b1) q{t} = Relu(c{t})
    d{t} = Conv<pads = [1,1,1,1]>(q{t}, w2, b2) s{t} = Add(d{t}, c{t}) r{t} = Relu(s{t})
    g{t} = GlobalAveragePool(r{t}) f{t} = Flatten(g{t}) e{t} = Gemm(f{t}, w3, b3)
    """


def scaled(rng: np.random.Generator, *shape: int) -> np.ndarray:
    fan = np.prod(shape[1:]) if len(shape) > 2 else shape[0] if len(shape) > 1 else 10
    return (rng.standard_normal(shape) * np.sqrt(1.6 / fan)).astype(np.float32)


def siamese(folder: Path) -> Path:
    """Two images through the same layers, and how far apart they come out."""
    rng = np.random.default_rng(0)
    sizes = {"w0": (24, 3, 3, 3), "w1": (32, 24, 3, 3), "w2": (32, 32, 3, 3), "w3": (32, 10)}
    weights = {name: scaled(rng, *shape) for name, shape in sizes.items()}
    biases = {f"b{k}": scaled(rng, size) for k, size in enumerate((24, 32, 32, 10))}
    body = branch("x", 0) + branch("z", 1) + "y = Sub(e0, e1)"
    inputs = "float[n,3,12,12] x, float[n,3,12,12] z"
    return save(folder / "m.onnx", inputs, "float[n,10] y", body, **weights, **biases)


def images(count: int, seed: int) -> dict[str, np.ndarray]:
    """Pairs that have six directions and some noise."""
    rng, basis = np.random.default_rng(seed), np.random.default_rng(99).standard_normal((6, 432)) / 2.5
    pair = [rng.standard_normal((count, 6)) @ basis + 0.3 * rng.standard_normal((count, 432)) for _ in range(2)]
    return {name: x.reshape(count, 3, 12, 12).astype(np.float32) for name, x in zip("xz", pair, strict=True)}


WIDTH, HEADS, INNER = 40, 5, 120


def layer(i: int) -> str:
    text = """
    q0 = MatMul(H, wq) q1 = Add(q0, bq) k0 = MatMul(H, wk) k1 = Add(k0, bk) v0 = MatMul(H, wv) v1 = Add(v0, bv)
    q2 = Reshape(q1, split) k2 = Reshape(k1, split) v2 = Reshape(v1, split) q3 = Transpose<perm = [0,2,1,3]>(q2)
    k3 = Transpose<perm = [0,2,3,1]>(k2) v3 = Transpose<perm = [0,2,1,3]>(v2) s0 = MatMul(q3, k3) s1 = Mul(s0, scale)
    p = Softmax(s1) c0 = MatMul(p, v3) c1 = Transpose<perm = [0,2,1,3]>(c0) c2 = Reshape(c1, join) o0 = MatMul(c2, wo)
    o1 = Add(o0, bo) r0 = Add(H, o1) n0 = LayerNormalization(r0, g0, t0) f0 = MatMul(n0, w1) f1 = Add(f0, b1)
    f2 = Relu(f1) f3 = MatMul(f2, w2) f4 = Add(f3, b2) r1 = Add(n0, f4) OUT = LayerNormalization(r1, g1, t1)
    """
    own = {"H": f"h_{i}", "OUT": f"h_{i + 1}"}
    made = {word for line in text.split(")") for word in [line.split("=")[0].strip()] if word and " " not in word}
    words = text.replace("(", " ( ").replace(")", " ) ").replace(",", " , ").split()
    return " ".join(own.get(word, f"{word}_{i}" if word in made else word) for word in words) + "\n"


def albert(folder: Path) -> Path:
    """An encoder of which one layer is applied three times."""
    rng = np.random.default_rng(0)
    d, one = WIDTH, np.ones(WIDTH, np.float32)
    square = {f"w{n}": scaled(rng, d, d) for n in "qkvo"} | {f"b{n}": scaled(rng, d) for n in "qkvo"}
    body = "e = Gather(table, ids) h_0 = MatMul(e, we) " + "".join(map(layer, range(3))) + "y = Add(h_3, h_0)"
    return save(
        folder / "m.onnx", "int64[n,t] ids", f"float[n,t,{d}] y", body, table=(60, 16), we=(16, d), **square,
        w1=scaled(rng, d, INNER), b1=scaled(rng, INNER), w2=scaled(rng, INNER, d), b2=scaled(rng, d), g0=one, g1=one,
        t0=0 * one, t1=0 * one, split=np.array([0, 0, HEADS, d // HEADS]), join=np.array([0, 0, d]),
        scale=np.array(1 / np.sqrt(d // HEADS), np.float32),
    )  # fmt: skip


def tokens(count: int, seed: int) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(seed).integers(0, 60, (count, 12))}


def prune(model: Path, data: Mapping[str, np.ndarray], *more: object) -> tuple[Path, dict[str, Any]]:
    out, report, samples = (model.parent / name for name in ("s.onnx", "r.json", "c.npz"))
    np.savez(samples, **data)
    result = run("prune", model, "-o", out, "--calibration", samples, "--effort", "quick", "--no-measure", "--force",
                 "--report", report, "--criterion", "mag", *more)  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, json.loads(report.read_text())


def off(dense: Path, pruned: Path, data: Mapping[str, np.ndarray]) -> float:
    """The squared difference of outputs, relative."""
    wanted, other = (ort.InferenceSession(path).run(None, dict(data))[0] for path in (dense, pruned))
    return float(np.square(wanted - other).mean() / np.square(wanted).mean())


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("target", ["macs=0.6", "params=0.6"])
@pytest.mark.parametrize(("make", "data", "fitted"), [
    (siamese, images, {"w1", "w2", "w3", "b1", "b2"}),
    (albert, tokens, {"wq", "wk", "wv", "wo", "w1", "w2"}),
])  # fmt: skip
def test_one_weight_is_fitted_on_all_that_its_readers_read(
    make: Any, data: Any, fitted: set[str], target: str, tmp_path: Path
) -> None:
    dense, fresh = make(tmp_path), data(100, 2)
    out, report = prune(dense, data(200, 1), "--target", target, "--reconstruct", "none")
    naive, before, params = off(dense, out, fresh), arrays(out), report["pruned"]["params"]
    out, report = prune(dense, data(200, 1), "--target", target)
    assert off(dense, out, fresh) < 0.35 * naive
    assert fitted <= set(report["repaired"])
    assert report["pruned"]["params"] == params
    after = arrays(out)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.shape == after[name].shape
        assert name in report["repaired"] or array.tobytes() == after[name].tobytes(), name
    assert run("verify", dense, out, "--plan", tmp_path / "r.json").exit_code == 0


@pytest.mark.parametrize("method", ["lsq", "obs-block", "mask-tune"])
def test_named_repairs_take_shared_weights_too(method: str, tmp_path: Path) -> None:
    dense, fresh = siamese(tmp_path), images(100, 2)
    given = images(200, 1), "--ratio", 0.3, "--reconstruct"
    naive = off(dense, prune(dense, *given, "none")[0], fresh)
    out, report = prune(dense, *given, method)
    assert report["repaired"]
    assert off(dense, out, fresh) < naive


def test_codes_of_two_readers_are_fitted_as_one(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([images(64, 3)])

        def get_next(self) -> Any:
            return next(self.left, None)

    plain, dense, fresh = siamese(tmp_path), tmp_path / "q.onnx", images(100, 2)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(plain, dense, Once(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    naive = off(dense, prune(dense, images(200, 1), "--ratio", 0.3, "--reconstruct", "none")[0], fresh)
    out, report = prune(dense, images(200, 1), "--ratio", 0.3)
    assert {"w1_quantized", "w2_quantized"} <= set(report["repaired"])
    assert off(dense, out, fresh) < 0.5 * naive
    assert arrays(out)["w1_quantized"].dtype == np.int8


# Which weights, and in which order -----------------------------------------------------------------------------------


def joint(model: ir.Model) -> list[Site]:
    """Sites of a model of which nothing goes; shared weights are among them."""
    model = ir.passes.common.ShapeInferencePass()(model).model
    shapes = {
        str(v.name): tuple(d if isinstance(d, int) else 3 for d in v.shape)
        for node in model.graph
        for v in (*node.inputs, *node.outputs)
        if v is not None and v.shape is not None
    }
    return find_sites(model, model, shapes, whole(shapes), joint=True)


def test_readers_side_by_side_are_visited_at_once_before_what_they_feed() -> None:
    body = "a = MatMul(x, w) c = MatMul(a, u) b = MatMul(z, w) d = MatMul(b, u) y = Add(c, d)"
    model = built("float[n,5] x, float[n,5] z", "float[n,5] y", body, w=(5, 5), u=(5, 5))
    sites = joint(model)
    assert [(site.value, [o.tie for o in site.operators]) for site in sites] == [
        ("a", ["w"]), ("b", ["w"]), ("y", ["u", "u"]),
    ]  # fmt: skip
    assert visits(model.graph, sites) == [Visit((0, 1)), Visit((2,))]
    assert {site.value for site in found(model).values()} == set()


def test_a_reader_behind_another_is_behind() -> None:
    body = "a = MatMul(x, w) b = Relu(a) k = MatMul(b, v) c = MatMul(k, w) d = Relu(c) y = MatMul(d, u)"
    model = built("float[n,5] x", "float[n,2] y", body, w=(5, 5), v=(5, 5), u=(5, 2))
    sites = joint(model)
    assert [site.value for site in sites] == ["a", "k", "c", "y"]
    assert visits(model.graph, sites) == [Visit((0, 2), frozenset([2])), Visit((1,)), Visit((3,))]


def test_a_private_layer_in_front_of_one_reader_comes_first() -> None:
    body = "a = MatMul(x, w) b = Relu(a) k = MatMul(z, v) l = Relu(k) c = MatMul(l, w) d = Relu(c) y = Add(b, d)"
    model = built("float[n,5] x, float[n,5] z", "float[n,5] y", body, w=(5, 5), v=(5, 5))
    sites = joint(model)
    assert visits(model.graph, sites) == [Visit((1,)), Visit((0, 2))]


@pytest.mark.parametrize(
    "body",
    [
        "a = MatMul(x, w) b = Relu(a) y = Gemm<transB = 1>(b, w)",
        "a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) y = Add(c, w)",
        "a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) i = Cast<to = 7>(x) e = Gather(w, i) z = Relu(e) y = Add(c, c)",
        "a = MatMul(x, w) y = MatMul(w, a)",
    ],
)  # fmt: skip
def test_a_weight_that_is_read_in_two_ways_stays(body: str) -> None:
    assert joint(built("float[5,5] x", "float[5,5] y", body, w=(5, 5))) == []


def test_a_weight_that_is_an_output_stays() -> None:
    model = built("float[n,5] x", "float[n,5] y", "a = MatMul(x, w) b = Relu(a) y = MatMul(b, w)", w=(5, 5))
    model.graph.outputs.append(model.graph.initializers["w"])
    assert joint(model) == []


def test_weights_behind_one_transpose_or_several() -> None:
    body = """s = Transpose<perm = [1,0]>(w) a = MatMul(x, s) b = Relu(a) c = MatMul(b, s) d = Relu(c)
              t = Transpose<perm = [1,0]>(w) y = MatMul(d, t)"""
    sites = joint(built("float[n,5] x", "float[n,5] y", body, w=(5, 5)))
    assert [(o.tie, o.weight) for site in sites for o in site.operators] == [
        ("w", ("s", 0)), ("w", ("s", 0)), ("w", ("t", 0)),
    ]  # fmt: skip


def test_where_gains_differ_each_reader_is_fitted_before_its_own() -> None:
    body = "a = MatMul(x, w) b = Mul(a, g) c = Relu(b) d = MatMul(c, w) e = Mul(d, h) y = Relu(e)"
    sites = joint(built("float[n,5] x", "float[n,5] y", body, w=(5, 5), g=(5,), h=(5,)))
    assert [site.value for site in sites] == ["a", "d"]
    sites = joint(built("float[n,5] x", "float[n,5] y", body.replace("h", "g"), w=(5, 5), g=(5,)))
    assert [site.value for site in sites] == ["b", "e"]


@pytest.mark.parametrize("biases", [("p", "p"), ("p", "q"), ("p", ""), ("", "")])
def test_what_is_left_says_what_went_whatever_constants_there_are(biases: tuple[str, str], tmp_path: Path) -> None:
    """The third of four channels is a sum of others: without it two readers of one weight can be as they were."""
    rng = np.random.default_rng(0)
    ways = [f"Gemm({x}, w, {b})" if b else f"Gemm({x}, w)" for x, b in zip(("r", "s"), biases, strict=True)]
    body = f"r = MatMul(x, u) s = MatMul(z, u) c = {ways[0]} d = {ways[1]} y = Concat<axis = 1>(c, d)"
    u = rng.standard_normal((6, 40)).astype(np.float32)
    u[:, 7] = u[:, 1:5].sum(axis=1) * 1e-2  # small, so that it goes
    own = {name: scaled(rng, 30) for name in set(biases) - {""}}
    model = save(tmp_path / "m.onnx", "float[n,6] x, float[n,6] z", "float[n,60] y", body, u=u, w=(40, 30), **own)
    data = {name: rng.standard_normal((200, 6)).astype(np.float32) + 1 for name in "xz"}
    out, report = prune(model, data, "--ratio", 0.03, "--round-to", 1, "--reconstruct", "sequential")
    assert report["pruned"]["params"] < report["dense"]["params"]
    naive, _ = prune(model, data, "--ratio", 0.03, "--round-to", 1, "--reconstruct", "none")
    lost = off(model, naive, data)
    out, report = prune(model, data, "--ratio", 0.03, "--round-to", 1)
    assert off(model, out, data) < 1e-4 * lost
    assert report["pruned"]["params"] == (len(set(biases) - {""}) * 30 + 6 * 39 + 39 * 30)
