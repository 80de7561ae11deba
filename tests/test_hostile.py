"""Files and arguments that mean harm: nothing that is read is ever written, and sizes and endless work are bounded."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from test_reading import BAD, Model, add, external, mlp, weight
from test_writing import files

from onnxprune import prove, reading, storage
from onnxprune.cli import main
from onnxprune.errors import InputError


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


# What is read is never written ---------------------------------------------------------------------------------------

PRUNE = "prune {model} --ratio 0.5 --no-measure --force"
WRITES = {
    "prune": f"{PRUNE} -o {{out}}",
    "prune, read too": f"{PRUNE} -o {{out}} --calibration {{folder}}/c.npz --recipe {{folder}}/r.yaml",
    "data in a folder": f"{PRUNE} -o {{out}} --calibration {{folder}} --evaluation {{folder}}/c.npz",
    "recipe": f"{PRUNE} -o {{folder}}/new.onnx --save-recipe {{out}} --calibration {{folder}}/c.npz "
    "--recipe {folder}/r.yaml",
    "realize": "realize {model} -o {out} --no-measure --force",
    "sparsify": "sparsify {model} -o {out} --no-measure --force --calibration {folder}/c.npz",
    "sensitivity": "sensitivity {model} --csv {out} --force --calibration {folder}/c.npz",
    "export": "export {model} -o {out} --to onnx --input-shape x:2x5 --force --calibration {folder}/c.npz",
}
SPELLINGS = ("m.onnx", "./m.onnx", "deep/../m.onnx", "../link/m.onnx", "soft.onnx", "hard.onnx", "b.bin", "deep/a.bin",
             "../link/b.bin")  # fmt: skip
READ = ("c.npz", "soft.npz", "r.yaml")


def victim(tmp_path: Path) -> Path:
    """The folder of a model with weights beside it, with data, a recipe, and other names for all of them."""
    folder = tmp_path / "model"
    folder.mkdir()
    external(folder)
    np.savez(folder / "c.npz", x=np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32))
    (folder / "r.yaml").write_text("round-to: 1")
    (folder / "hard.onnx").hardlink_to(folder / "m.onnx")
    (folder / "soft.onnx").symlink_to("m.onnx")
    (folder / "soft.npz").symlink_to("c.npz")
    (tmp_path / "link").symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    ("verb", "spelling"),
    [
        (verb, spelling)
        for verb, line in WRITES.items()
        for spelling in (*SPELLINGS, *READ)
        if spelling not in READ or f"{{folder}}/{spelling.replace('soft', 'c')}" in line
    ],
)
def test_no_output_is_an_input_however_it_is_spelled(verb: str, spelling: str, tmp_path: Path) -> None:
    folder = victim(tmp_path)
    before = files(tmp_path)
    given = {"model": folder / "m.onnx", "folder": folder, "out": folder / spelling}
    result = run(*WRITES[verb].format(**given).split())
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize("linked", ["m.onnx", "c.npz"])
@pytest.mark.parametrize("how", ["hardlink_to", "symlink_to"])
@pytest.mark.parametrize(
    ("verb", "suffix", "beside"),
    [
        ("build", ".engine", ".engine"),
        ("build", ".engine", ".engine.json"),
        ("export --to ort", ".ort", ".ort"),
        ("export --to openvino", ".xml", ".xml"),
        ("export --to openvino", ".xml", ".bin"),
    ],
)
def test_no_output_with_a_suffix_of_its_own_is_an_input(
    verb: str, suffix: str, beside: str, how: str, linked: str, tmp_path: Path
) -> None:
    folder = victim(tmp_path)
    getattr(folder / f"o{beside}", how)(folder / linked)
    before = files(tmp_path)
    given = ("--force", "--input-shape", "x:2x5", "--calibration", folder / "c.npz")
    result = run(*verb.split(), folder / "m.onnx", "-o", folder / f"o{suffix}", *given)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert files(tmp_path) == before


def test_a_timing_cache_is_no_input(tmp_path: Path) -> None:
    folder = victim(tmp_path)
    before = files(tmp_path)
    for name in ("m.onnx", "soft.onnx", "c.npz"):
        given = ("--input-shape", "x:2x5", "--calibration", folder / "c.npz", "--timing-cache", folder / name)
        assert run("build", folder / "m.onnx", "-o", folder / "o.engine", *given).exit_code == 2
        assert files(tmp_path) == before


@pytest.mark.parametrize("spelling", ["o.json", "./o.json", "../link/o.json"])
def test_two_outputs_are_never_one_file(spelling: str, tmp_path: Path) -> None:
    folder = victim(tmp_path)
    before = files(tmp_path)
    report = ("--report", folder / spelling, "--force")
    prune = ("prune", folder / "m.onnx", "--ratio", 0.5, "--no-measure", *report)
    for both in (("-o", folder / "o.json"), ("-o", folder / "o.onnx", "--save-recipe", folder / "o.json")):
        result = run(*prune, *both)
        assert result.exit_code == 2
        assert "written twice" in result.stderr
        assert files(tmp_path) == before


def test_a_recipe_that_cannot_be_written_takes_the_model_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = victim(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(storage, "write_text", lambda *args, **kwargs: os.read(-1, 1))
    result = run(*f"{PRUNE} -o {folder}/o.onnx --save-recipe {folder}/s.yaml".format(model=folder / "m.onnx").split())
    assert result.exit_code == 4
    assert files(tmp_path) == before


def test_a_batch_writes_over_no_model_and_leaves_no_empty_folders(tmp_path: Path) -> None:
    for name in ("a/x.onnx", "b/y.onnx"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(mlp().SerializeToString() if name == "a/x.onnx" else b"no model")
    listed = tmp_path / "list.json"
    listed.write_text("b/y.onnx\n")
    listed.with_name("y.onnx").hardlink_to(tmp_path / "a" / "x.onnx")
    before = files(tmp_path)
    assert run("batch", listed, "-o", tmp_path / "new" / "deep", "--ratio", 0.5).exit_code == 2
    assert not (tmp_path / "new").exists()
    listed.write_text("a/x.onnx\nb/y.onnx\n")
    before |= files(tmp_path)
    (tmp_path / "x.json").symlink_to("list.json")
    assert run("batch", listed, "-o", tmp_path, "--ratio", 0.5, "--force", "--no-measure").exit_code == 2
    assert {name: content for name, content in files(tmp_path).items() if name in before} == before


def test_a_run_that_loses_leaves_the_winners_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SMALL", 0)
    model, _ = reading.read_model(external(tmp_path))
    out = tmp_path / "o.onnx"

    def overtaken(candidate: Path) -> None:
        storage.write_model(model, out, force=False, external=True)

    with pytest.raises(InputError, match="exists"):
        storage.write_model(model, out, force=False, external=True, prove=overtaken)
    assert len(reading.read_model(out)[1].files) == 2
    assert len([*tmp_path.glob("*.data")]) == 1
    assert not [*tmp_path.glob(".*")]


def test_a_file_in_the_place_of_the_weights_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may name its data as the result's will be named; the hash in the name would be a forgery."""
    monkeypatch.setattr(storage, "SMALL", 0)
    model, _ = reading.read_model(external(tmp_path))
    out = tmp_path / "o.onnx"
    _, data = storage.write_model(model, out, force=False, external=True)
    data.write_bytes(b"precious")
    with pytest.raises(InputError, match="holds something else"):
        storage.write_model(model, out, force=True, external=True)
    assert data.read_bytes() == b"precious"


def test_a_long_name_has_room_for_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(mlp().SerializeToString())
    out = tmp_path / ("é" * 125 + ".onnx")
    assert run("prune", tmp_path / "m.onnx", "-o", out, "--ratio", 0.5, "--no-measure").exit_code == 0
    assert sorted(files(tmp_path)) == ["m.onnx", out.name]


def test_names_that_are_no_text_are_paths_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    folder.mkdir()
    path = folder / os.fsdecode(b"\xfe.onnx")
    path.write_bytes(mlp().SerializeToString())
    report = folder / os.fsdecode(b"\xfe.json")
    out = folder / os.fsdecode(b"o\xff.onnx")
    done = run("prune", path, "-o", out, "--ratio", 0.5, "--no-measure", "--report", report)
    assert done.exit_code == 0, done.output
    assert run("verify", path, out, "--plan", report).exit_code == 0
    assert run("measure", path, out, "--rounds", 1).exit_code == 0
    assert run("compare", path, out).exit_code == 0


# Data that lies elsewhere --------------------------------------------------------------------------------------------


def outside(shape: tuple[int, ...] = (4,), kind: int = TensorProto.FLOAT) -> TensorProto:
    """A tensor that is said to lie in a file outside the model's folder."""
    tensor = TensorProto(name="t", dims=shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def body(model: Model) -> None:
    inner = helper.make_graph(
        [helper.make_node("Add", ["y", "t"], ["b"])], "body", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    inner.initializer.append(outside((1,)))
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    add(model, "If", ["flag"], "z", TensorProto.FLOAT, then_branch=inner, else_branch=inner)


def function(model: Model) -> None:
    inside = [helper.make_node("Constant", [], ["c"], value=outside((1,))), helper.make_node("Add", ["a", "c"], ["b"])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my", 1)]
    model.functions.append(helper.make_function("my", "Shift", ["a"], ["b"], inside, opsets))
    model.opset_import.append(opsets[1])
    model.graph.node[1].op_type, model.graph.node[1].domain = "Shift", "my"


def sparse(model: Model) -> None:
    values, at = outside((2,)), outside((2,), TensorProto.INT64)
    add(model, "Constant", [], "c", sparse_value=helper.make_sparse_tensor(values, at, [3]))
    add(model, "Add", ["y", "c"], "z", TensorProto.FLOAT)


def training(model: Model) -> None:
    model.training_info.add().initialization.initializer.append(outside())


ELSEWHERE: dict[str, Callable[[Model], object]] = {
    "initializer": lambda m: m.graph.initializer.append(outside()),
    "attribute": lambda m: add(m, "Constant", [], "c", value=outside()),
    "list in an attribute": lambda m: add(m, "Foo", ["y"], "c", domain="their", given=[outside(), outside()]),
    "body": body,
    "function": function,
    "sparse": sparse,
    "training": training,
}


@pytest.mark.parametrize(
    "verb", ["inspect {m}", "compare {m} {m}", "measure {m}", f"{PRUNE.format(model='{m}')} -o {{o}}"]
)
@pytest.mark.parametrize("place", ELSEWHERE)
def test_no_tensor_is_read_from_outside_the_folder(place: str, verb: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"MARKER" * 99)
    model = mlp(opset=18, ir=9)
    ELSEWHERE[place](model)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    result = run(*verb.format(m=folder / "m.onnx", o=folder / "o.onnx").split())
    assert result.exit_code == 2, result.output
    assert "outside the model's folder" in result.stderr
    assert "MARKER" not in result.output
    assert sorted(files(folder)) == ["m.onnx"]


# Sizes that lie ------------------------------------------------------------------------------------------------------


def elsewhere(model: Model, count: int, bytes_each: int, kind: int) -> None:
    """Constant nodes, or packed initializers, whose data is said to lie in w.bin."""
    for k in range(count):
        size = bytes_each * 2 if kind == TensorProto.INT4 else bytes_each // 4
        tensor = TensorProto(name=f"t{k}", dims=[size], data_type=kind, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(bytes_each))):
            tensor.external_data.add(key=key, value=value)
        if kind == TensorProto.INT4:
            model.graph.initializer.append(tensor)
        else:
            add(model, "Constant", [], f"c{k}", value=tensor)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT4])
@pytest.mark.parametrize(("count", "each"), [(1, 10**11), (1, 3 * 10**9)])
def test_what_must_be_read_whole_is_added_up_first(kind: int, count: int, each: int, tmp_path: Path) -> None:
    model = mlp(opset=21, ir=10)
    elsewhere(model, count, each, kind)
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(each)  # a file with a hole: it takes no room
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    result = run("inspect", tmp_path / "m.onnx")
    assert result.exit_code == 2
    assert "more than 2 GB" in result.stderr


def test_tensors_in_one_file_share_a_descriptor(tmp_path: Path) -> None:
    folder, count = Path("/proc/self/fd"), 400
    if not folder.exists():
        pytest.skip("needs /proc")
    model = mlp()
    values = np.arange(count * 4, dtype=np.float32).reshape(count, 4)
    values.tofile(tmp_path / "w.bin")
    for k in range(count):
        tensor = TensorProto(name=f"t{k}", dims=[4], data_type=1, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w.bin"), ("offset", str(16 * k)), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
        model.graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    before = len(list(folder.iterdir()))
    found, _ = reading.read_model(tmp_path / "m.onnx")
    assert len(list(folder.iterdir())) < before + 8
    stored = found.graph.initializers
    assert all(np.array_equal(stored[f"t{k}"].const_value.numpy(), values[k]) for k in range(count))  # type: ignore[union-attr]


def test_arrays_that_nobody_asks_for_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(mlp().SerializeToString())
    monkeypatch.setattr(storage, "DATA_LIMIT", 10_000)
    np.savez(tmp_path / "c.npz", x=np.ones((4, 5), np.float32), bomb=np.zeros(10**6))
    prune = ("prune", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--no-measure")
    assert run(*prune, "--calibration", tmp_path / "c.npz").exit_code == 0
    np.savez(tmp_path / "c.npz", x=np.zeros((10**6, 5), np.float32))
    result = run(*prune, "--calibration", tmp_path / "c.npz", "--force")
    assert result.exit_code == 2
    assert "holds more than" in result.stderr


def test_a_header_that_says_it_is_huge_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + bytes(10**6))
    with pytest.raises(InputError, match="header is damaged"):
        storage.read_arrays(tmp_path / "c.npz")


# Work without end ----------------------------------------------------------------------------------------------------


def stored(model: Model, **arrays: object) -> None:
    model.graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in arrays.items())


def doubled(model: Model, value: str, count: int, axis: int) -> str:
    """A value behind itself, again and again."""
    for k in range(count):
        add(model, "Concat", [value, value], f"{value}{k}", axis=axis)
        value = f"{value}{k}"
    return value


def grown(count: int) -> Model:
    model = mlp(opset=18)
    add(model, "ReduceSum", [doubled(model, "y", count, 1)], "s", TensorProto.FLOAT, keepdims=0)
    return model


def numbers(count: int) -> Model:
    model = mlp(opset=18)
    stored(model, i=np.arange(1000))
    add(model, "ReduceMax", [doubled(model, "i", count, 0)], "s", TensorProto.INT64, keepdims=0)
    return model


def outer(op_type: str) -> Model:
    """A table of 60,000 x 40,000 out of two lists of numbers."""
    model = mlp(opset=18)
    stored(model, a=np.arange(60_000)[:, None], b=np.arange(40_000)[None])
    add(model, op_type, ["a", "b"], "t")
    add(model, "ReduceMax", ["t"], "s", TensorProto.INT64, keepdims=0)
    return model


def einsum() -> Model:
    model = mlp(opset=18)
    stored(model, a=np.arange(60_000))
    add(model, "Einsum", ["a"] * 4, "s", TensorProto.INT64, equation="a,b,c,d->")
    return model


def sized(op_type: str, size: int) -> Model:
    """An operator that makes as much as a number says."""
    model = mlp(opset=18)
    inputs = {
        "ConstantOfShape": {"n": [size]},
        "Range": {"n": 0, "m": size, "k": 1},
        "Tile": {"n": np.ones((1, 1), np.float32), "m": [1, size]},
        "Expand": {"n": np.ones((1, 1), np.float32), "m": [3, size]},
        "Pad": {"n": np.ones((1, 1), np.float32), "m": [0, 0, 0, size]},
        "OneHot": {"n": [1, 2], "m": size, "k": [0, 1]},
        "HannWindow": {"n": size},
    }[op_type]
    stored(model, **inputs)
    add(model, op_type, list(inputs), "t")
    add(model, "Cast", ["t"], "f", to=TensorProto.FLOAT)
    add(model, "ReduceSum", ["f"], "s", TensorProto.FLOAT, keepdims=0)
    return model


def loop(trips: int | None, doubles: bool = False) -> Model:
    """Rounds without end; in one form each is twice as large as the one before, and a condition is computed."""
    body = mlp().graph
    body.Clear()
    body.name = "body"
    infos = (("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("v", TensorProto.INT64, None))
    body.input.extend(helper.make_tensor_value_info(*info) for info in infos)
    body.output.extend(helper.make_tensor_value_info(f"{name}_out", *rest) for name, *rest in infos[1:])
    if doubles:
        body.node.append(helper.make_node("Concat", ["v", "v"], ["v_out"], axis=0))
        body.node.append(helper.make_node("ReduceMax", ["v_out"], ["top"], keepdims=0))
        body.node.append(helper.make_node("Less", ["top", "i"], ["not_yet"]))
        body.node.append(helper.make_node("Not", ["not_yet"], ["go_out"]))
    else:
        body.node.append(helper.make_node("Mul", ["v", "v"], ["v_out"]))
        body.node.append(helper.make_node("Identity", ["go"], ["go_out"]))
    model = mlp(opset=18)
    stored(model, start=np.array([10**9]), yes=True, **({} if trips is None else {"trips": trips}))
    model.graph.node.append(
        helper.make_node("Loop", ["" if trips is None else "trips", "yes", "start"], ["l"], body=body)
    )
    model.graph.output.append(helper.make_tensor_value_info("l", TensorProto.INT64, None))
    return model


def functions(depth: int) -> Model:
    """Each calls the one before twice: 2 ** depth operators."""
    model = mlp(opset=18, ir=9)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my", 1)]
    for k in range(depth):
        call = ("Relu", "") if k == 0 else (f"f{k - 1}", "my")
        body = [helper.make_node(call[0], [a], [b], domain=call[1]) for a, b in ("ab", "bc")]
        model.functions.append(helper.make_function("my", f"f{k}", ["a"], ["c"], body, opsets))
    model.opset_import.append(opsets[1])
    model.graph.node[1].op_type, model.graph.node[1].domain = f"f{depth - 1}", "my"
    return model


EXPLODING: dict[str, Callable[[], Model]] = {
    **{f"doubled {n} times": lambda n=n: grown(n) for n in (25, 60, 400)},  # type: ignore[misc]
    **{f"numbers doubled {n} times": lambda n=n: numbers(n) for n in (20, 60)},  # type: ignore[misc]
    **{f"outer {op}": lambda op=op: outer(op) for op in ("Add", "MatMul")},  # type: ignore[misc]
    "einsum": einsum,
    **{
        f"{op} of {n}": lambda op=op, n=n: sized(op, n)  # type: ignore[misc]
        for op in ("ConstantOfShape", "Range", "Tile", "Expand", "Pad", "OneHot", "HannWindow")
        for n in (10**9, 2**62)
    },
    "endless loop": lambda: loop(None),
    "loop that doubles": lambda: loop(None, doubles=True),
    "functions": lambda: functions(60),
}

BOUNDED = """
import json, resource, signal, sys
from onnxprune.analysis import Analysis
from onnxprune.errors import PruneError
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
found = {}
for path in sys.argv[1:]:
    signal.alarm(30)
    try:
        Analysis(path)
        found[path] = 0
    except PruneError as error:
        found[path] = error.code
print(json.dumps(found))
"""


def test_what_explodes_is_analysed_or_refused_in_little_time_and_memory(tmp_path: Path) -> None:
    paths = []
    for k, make in enumerate(EXPLODING.values()):
        paths.append(tmp_path / f"{k}.onnx")
        paths[-1].write_bytes(make().SerializeToString())
    done = subprocess.run([sys.executable, "-c", BOUNDED, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = dict(zip(EXPLODING, json.loads(done.stdout).values(), strict=True))
    assert set(codes.values()) <= {0, 2, 4}, codes


@pytest.mark.parametrize("make", [lambda: loop(None), lambda: loop(2**62), lambda: functions(60)])
def test_a_model_without_end_is_a_clean_error_soon(make: Callable[[], Model], tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(make().SerializeToString())
    result = run("prune", path, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--timeout", 4)
    assert result.exit_code == 4, result.output
    assert "m.onnx: " in result.stderr and "longer than 4 s" in result.stderr
    assert sorted(files(tmp_path)) == ["m.onnx"]
    assert run("measure", path, "--timeout", 4).exit_code == 4


@pytest.mark.slow
def test_a_loop_that_is_long_by_its_number_of_rounds_gets_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing says why it should, a model that nobody has seen running is not waited for as long."""
    monkeypatch.setattr(prove, "FIRST", (1.5, 0.0))
    path = tmp_path / "m.onnx"
    codes = []
    for trips in (3_000_000, 2**40, None):
        path.write_bytes(loop(trips).SerializeToString())
        codes.append(run("measure", path, "--rounds", 1, "--seconds", 1).exit_code)
        prune = ("prune", path, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--no-measure", "--force")
        codes.append(run(*prune).exit_code)
    assert codes == [0, 0, 4, 4, 4, 4]


def test_many_keys_and_many_models_take_no_longer_than_they_should(tmp_path: Path) -> None:
    """In a time that grows with their square, these would take hours."""
    (tmp_path / "m.onnx").write_bytes(mlp().SerializeToString())
    (tmp_path / "r.yaml").write_text("{" + ",".join(f"k{k}" for k in range(60_000)) + "}")
    assert run("prune", tmp_path / "m.onnx", "-o", tmp_path / "o", "--recipe", tmp_path / "r.yaml").exit_code == 2
    (tmp_path / "list").write_text("\n".join(f"{k}/m.onnx" for k in range(300_000)))
    assert run("batch", tmp_path / "list", "-o", tmp_path / "new", "--ratio", 0.5).exit_code == 2


def test_the_program_takes_no_more_memory_than_there_is() -> None:
    script = """
import resource, sys
from onnxprune.cli import run
sys.argv[1:] = ["--version"]
try:
    run()
except SystemExit:
    print(resource.getrlimit(resource.RLIMIT_DATA)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    most = int(done.stdout.split()[-1])
    assert sys.platform != "linux" or 0 < most < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert most != resource.RLIM_INFINITY or sys.platform != "linux"


VERBS = (
    "inspect {m}", "measure {m} --rounds 1", "compare {m} {m}", "sensitivity {m} --csv {d}/s.csv",
    "sparsify {m} -o {d}/o.onnx", "realize {m} -o {d}/o.onnx", "export {m} -o {d}/o.onnx --to onnx",
    "export {m} -o {d}/o.ort --to ort", "export {m} -o {d}/o.xml --to openvino", "build {m} -o {d}/o.engine",
    "batch {m}.txt -o {d}/new --ratio 0.5",
)  # fmt: skip
KINDS = (
    "empty", "text", "half", "cycle", "huge dim", "short data", "endless function", "shapes contradict",
    "custom operator", "a node that makes nothing", "input without a type", "their attribute of another type",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_bad_models_in_one_line(verb: str, tmp_path: Path) -> None:
    if "openvino" in verb:
        pytest.importorskip("openvino", reason="pip install 'onnxprune[openvino]'")
    if verb.startswith("build"):
        pytest.importorskip("tensorrt_rtx", reason="pip install 'onnxprune[tensorrt-rtx]'")
    path = tmp_path / "m.onnx"
    path.with_name("m.onnx.txt").write_text("m.onnx\n")
    for kind in KINDS:
        path.write_bytes(BAD[kind][0])
        before = files(tmp_path)
        result = run(*verb.format(m=path, d=tmp_path).split())
        if verb.startswith("inspect") and result.exit_code == 0:  # nothing ran it
            continue
        assert result.exit_code == 2, (kind, result.output)
        assert result.stderr.startswith("onnxprune: error: "), kind
        assert result.stderr.count("\n") == 1, kind
        assert files(tmp_path) == before, kind


OUT_OF_RANGE = {
    "compare {m} {m}": (
        "--seed -1", "--max-relative-error nan", "--input-shape x:0x5", "--timeout 0", "--timeout nan",
    ),
    "verify {m} {m} --plan {m}": ("--seed 99999999999999999999", "--timeout -1"),
    "measure {m}": (
        "--threads 99999", "--threads 0", "--rounds 0", "--seconds nan", "--seconds inf", "--timeout 0",
        "--input-shape x:1x99999999999",
    ),
    "sparsify {m} -o {o}": (
        "--pattern 0:4", "--pattern 4:2", "--memory nan", "--seed -1", "--cache c --no-cache", "--timeout nan",
    ),
    "realize {m} -o {o}": ("--tolerance nan", "--tolerance -1", "--backend abacus"),
    "sensitivity {m}": ("--levels nan", "--levels 1", "--levels ,", "--min-keep 0", "--threads 0"),
    "prune {m} -o {o} --ratio 0.5": ("--no-measure --backend abacus", "--timeout nan", "--memory 0", "--ratio nan"),
    "batch {d} -o {d}/new --ratio 0.5": ("--threads 0", "--min-keep -1"),
    "export {m} -o {o} --to onnx": ("--timeout 0", "--threads 0", "--seed -1"),
    "build {m} -o {o}.engine": (
        "--timeout nan", "--threads 99999", "--input-shape x:3x5..2x5..4x5", "--input-shape x:1x5..2x5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", [f"{verb} {extra}" for verb, extras in OUT_OF_RANGE.items() for extra in extras])
def test_numbers_out_of_range_are_one_line_and_exit_2(line: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(mlp().SerializeToString())
    result = run(*line.format(m=path, o=tmp_path / "o.onnx", d=tmp_path).split(" "))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("onnxprune: error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(files(tmp_path)) == ["m.onnx"]


# Messages ------------------------------------------------------------------------------------------------------------

NASTY = "\x1b[31m[red]\\[/red] [/] :bug: \u202e\r\n"
SHOWS = (
    "inspect {m}", "explain {m} w1{n}:1 w2{n}:0", "sensitivity {m}", "compare {m} {m}", "measure {m} --rounds 1",
    "prune {m} -o {d}/o.onnx --ratio 0.5 --no-measure -v", "prune {m} -o {d}/p.onnx --ratio 0.5 --dry-run",
    "sparsify {m} -o {d}/s.onnx --no-measure -v", "batch {d} -o {d}/all --ratio 0.5 --no-measure",
    "realize {m} -o {d}/r.onnx --no-measure", "export {m} -o {d}/e.ort --to ort --input-shape x{n}:2x5",
)  # fmt: skip


@pytest.mark.parametrize("verb", SHOWS)
def test_names_are_shown_and_never_obeyed(verb: str, tmp_path: Path) -> None:
    names = tuple(f"{name}{NASTY}" for name in ("x", "w1", "b1", "w2", "b2", "h", "r", "y"))
    model = mlp(names)
    for node in model.graph.node:
        node.name += NASTY
    rows = np.random.default_rng(0).standard_normal(weight(model).dims[:2])
    weight(model).CopyFrom(numpy_helper.from_array(np.where(np.arange(16) < 4, 0, rows).astype(np.float32), names[1]))
    bias = model.graph.initializer[1]
    bias.CopyFrom(numpy_helper.from_array(np.zeros(16, np.float32), names[2]))
    path = tmp_path / f"{NASTY.replace('/', '')}.onnx"
    path.write_bytes(model.SerializeToString())
    result = run(*(part.format(m=path, d=tmp_path, n=NASTY) for part in verb.split(" ")))
    assert result.exit_code == 0, result.output
    assert all(c.isprintable() or c == "\n" for c in result.output)
    assert "\U0001f41b" not in result.output
