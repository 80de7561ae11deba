"""What is written is whole or not there at all, whatever fails, and nothing else is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper
from test_reading import external, mlp

from onnxprune import pipeline, storage, verify
from onnxprune.analysis import Analysis
from onnxprune.cli import main
from onnxprune.errors import InternalError, MachineError, shown, shown_path
from onnxprune.prove import Prover
from onnxprune.types import Plan


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(mlp().SerializeToString())
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Failing disks ------------------------------------------------------------------------------------------------------


WRITING = {
    "prune": "prune {m} -o {d}/o.onnx --ratio 0.5 --no-measure --report {d}/r.json --save-recipe {d}/r.yaml",
    "sparsify": "sparsify {m} -o {d}/o.onnx --no-measure --report {d}/r.md",
    "realize": "realize {m} -o {d}/o.onnx --no-measure --report {d}/r.html",
    "sensitivity": "sensitivity {m} --csv {d}/s.csv --plot {d}/s.svg",
    "export": "export {m} -o {d}/o.ort --to ort --input-shape x:2x5",
    "export of two files": "export {m} -o {d}/o.xml --to openvino --input-shape x:2x5",
    "batch": "batch {m} -o {d}/new/small --ratio 0.5 --no-measure",
}


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize("verb", WRITING)
def test_a_disk_that_fails_leaves_nothing_behind(
    verb: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    weights = numpy_helper.to_array(mlp().graph.initializer[2]) * (np.arange(16) > 2)[:, None]
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(weights.astype(np.float32), "w2"))  # to be realized
    path.write_bytes(model.SerializeToString())
    (tmp_path / "list").write_text("m.onnx")
    before, real = files(tmp_path), getattr(os, call)
    monkeypatch.setattr(storage, "SMALL", 0)  # so that there is a data file to be left behind
    for nth in range(1, 9):
        count = 0

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if str(args[0]).startswith(str(tmp_path)) or isinstance(args[0], int):
                count += 1
                if count == nth:  # noqa: B023
                    raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(storage.os, call, failing)
        given = {"m": tmp_path / "list" if verb == "batch" else path, "d": tmp_path}
        result = run(*WRITING[verb].format(**given).split(" "))
        monkeypatch.setattr(storage.os, call, real)
        if count < nth:
            assert result.exit_code == 0, result.output
            break
        assert result.exit_code == 4, result.output
        assert "No space left" in result.stderr
        assert files(tmp_path) == before
        assert not (tmp_path / "new").exists()
    assert nth > 1


def test_a_report_that_cannot_be_written_takes_the_model_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise MachineError("disk full")

    monkeypatch.setattr(storage, "write_text", full)
    before = files(tmp_path)
    result = run("prune", model, "-o", tmp_path / "o_{target}.onnx", "--target", "macs=0.7,0.5", "--no-measure",
                 "--report", tmp_path / "r_{target}.md")  # fmt: skip
    assert result.exit_code == 4
    assert files(tmp_path) == before


def test_a_broken_file_never_gets_its_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.write_model

    def torn(*args: Any, prove: Callable[[Path], None] | None = None, **kwargs: Any) -> Any:
        def tear(candidate: Path) -> None:
            candidate.write_bytes(candidate.read_bytes()[:100])
            assert prove is not None
            prove(candidate)

        return real(*args, prove=tear if prove is not None else None, **kwargs)

    monkeypatch.setattr(storage, "write_model", torn)
    before = files(tmp_path)
    result = run("prune", model, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--no-measure")
    assert result.exit_code == 5, result.output
    assert files(tmp_path) == before


# Interrupts, crashes, several at once -------------------------------------------------------------------------------


def start(*args: object, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "onnxprune", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)


READY = """
import sys
from onnxprune import interrupt
interrupt.hear(interrupt.leave)
print("ready", flush=True)
from onnxprune.__main__ import run
run()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "moments"),
    [
        (signal.SIGINT, (0, 0.03, 0.1, 0.16, 0.25, 0.35, 0.5, 0.8, 1.2, 1.8, 3.0)),
        (signal.SIGTERM, (0, 0.05, 0.2, 0.4, 0.6, 1.0, 1.5, 2.2)),
    ],
)
def test_an_interrupt_ends_it_soon_and_without_a_trace(
    sent: signal.Signals, moments: tuple[float, ...], model: Path, tmp_path: Path
) -> None:
    """At any moment from our first line on: while modules load, while models run, and while files are written."""
    before, scratch, out = files(tmp_path), tmp_path / "scratch", tmp_path / "o.onnx"
    scratch.mkdir()
    command = [sys.executable, "-c", READY, "prune", str(model), "-o", str(out), "--ratio", "0.5", "--no-measure"]
    for after in moments:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=os.environ | {"TMPDIR": str(scratch)})  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(after)
        process.send_signal(sent)
        sent_at = time.monotonic()
        _, stderr = process.communicate(timeout=30)
        assert time.monotonic() - sent_at < 5, after
        written = out.exists()  # if it was done already, or interrupted on the way out, it is whole
        if written:
            onnx.checker.check_model(onnx.load(out))
            out.unlink()
        assert process.returncode == 130 or (process.returncode == 0 and written), (after, stderr)
        assert stderr == ("onnxprune: interrupted\n" if process.returncode else ""), after
        assert files(tmp_path) == before, after
        assert not [*scratch.iterdir()], after


def test_interrupts_are_heard_before_anything_large_is_loaded() -> None:
    code = """
import sys
from onnxprune import __main__ as program
def heard(handler):
    print(handler.__name__, {"click", "numpy", "onnx", "subprocess"} & set(sys.modules))
    sys.exit()
program.interrupt.hear = heard
program.run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "leave set()\n"


def test_an_interrupt_that_meets_a_destructor_is_not_lost() -> None:
    code = """
import os, signal, time
from onnxprune import interrupt
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
interrupt.hear(interrupt.unwind)
interrupt.insist()
try:
    Last()
    time.sleep(9)
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("heard\n", "")


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_model_and_can_be_run_again(tmp_path: Path) -> None:
    """Killed at each step of writing: what bears the output's name is complete, and the same command works."""
    path, out = external(tmp_path), tmp_path / "o.onnx"
    before = files(tmp_path)
    args = ("prune", str(path), "-o", str(out), "--ratio", "0.5", "--no-measure", "--force")
    ends = []
    for nth in range(1, 12):
        script = KILL.format(nth=nth, args=args)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
        ends.append(done.returncode)
        left = files(tmp_path)
        assert {name: left[name] for name in before} == before
        if "o.onnx" in left:
            assert len(storage.read_model(out)[0].graph.outputs) == 1
            Analysis(out)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert ends[0] == -signal.SIGKILL
    assert ends[-1] == 0, "the last run went through, past all temporary files of the others"


KILL = """
import os, signal
from onnxprune import storage
from onnxprune.cli import main
storage.SMALL = 0
count = 0
def at(name):
    real = getattr(os, name)
    def step(*args, **kwargs):
        global count
        count += 1
        if count == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, step)
at("fsync"), at("replace")
main({args})
"""


@pytest.mark.slow
def test_many_at_once_have_one_complete_winner(model: Path, tmp_path: Path) -> None:
    args = ("prune", model, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--no-measure", "-q")
    runs = [start(*args, PYTHONHASHSEED=str(k)) for k in range(4)]
    codes = sorted((process.communicate(timeout=120), process.returncode)[1] for process in runs)
    assert codes[0] == 0
    assert set(codes) <= {0, 2}
    assert sorted(files(tmp_path)) == ["m.onnx", "o.onnx"]
    alone = tmp_path / "alone.onnx"
    assert run("prune", model, "-o", alone, "--ratio", 0.5, "--no-measure").exit_code == 0
    assert alone.read_bytes() == (tmp_path / "o.onnx").read_bytes()


# A rule that is wrong -----------------------------------------------------------------------------------------------


def wrong(groups: frozenset[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the proof of these groups fail, as a rule that ties the wrong positions would."""
    real = verify.removals

    def removals(found: Any, plan: Plan, *others: Any) -> list[verify.Removal]:
        rows = real(found, plan, *others)
        return [r for r in rows if r.group not in groups or r.role != "weight"]

    monkeypatch.setattr(verify, "removals", removals)


def two_layers(tmp_path: Path) -> Path:
    path = tmp_path / "two.onnx"
    path.write_bytes(deep().SerializeToString())
    return path


def deep() -> onnx.ModelProto:
    """x [n, 5] -> 16 -> 11 -> 3: two groups."""
    model = mlp()
    rng = np.random.default_rng(1)
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(rng.standard_normal((16, 11)).astype(np.float32), "w2"))
    model.graph.initializer[3].CopyFrom(numpy_helper.from_array(rng.standard_normal(11).astype(np.float32), "b2"))
    model.graph.node[2].output[0] = "h2"
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((11, 3)).astype(np.float32), "w3"))
    model.graph.node.append(onnx.helper.make_node("Relu", ["h2"], ["r2"]))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["r2", "w3"], ["y"]))
    return model


def test_a_group_that_fails_its_proof_is_left_alone_and_the_rest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = two_layers(tmp_path)
    wrong(frozenset([0]), monkeypatch)
    result = run("prune", path, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--no-measure", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(g["before"], g["after"]) for g in found["groups"]] == [(16, 16), (11, 6)]
    assert found["verification"]["unproven"] == ["group 0"]
    assert "our bug" in result.stderr
    assert any("unproven" in row["reason"] for row in found["frozen"])


def test_a_group_that_cannot_be_rewritten_is_left_alone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = two_layers(tmp_path), Analysis.rewrite

    def rewrite(self: Analysis, plan: Plan) -> Any:
        if not plan.keep.get(0, np.ones(1, np.bool_)).all():
            raise InternalError("MatMul gives [3, 16] where [3, 8] survive")
        return real(self, plan)

    monkeypatch.setattr(Analysis, "rewrite", rewrite)
    result = run("prune", path, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--no-measure", "--json")
    assert result.exit_code == 0, result.output
    assert [(g["before"], g["after"]) for g in json.loads(result.stdout)["groups"]] == [(16, 16), (11, 6)]


def test_nothing_that_can_be_proven_is_exit_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_layers(tmp_path)
    wrong(frozenset([0, 1]), monkeypatch)
    before = files(tmp_path)
    result = run("prune", path, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--no-measure")
    assert result.exit_code == 5, result.output
    assert result.stderr.count("\n") == 1
    assert files(tmp_path) == before


def test_a_runtime_that_crashes_is_exit_5(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Prover, worker: Any, *args: Any) -> None:
        worker.call(os.abort)

    monkeypatch.setattr(Prover, "check_dense", crash)
    before = files(tmp_path)
    result = run("prune", model, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--no-measure")
    assert result.exit_code == 5, result.output
    assert "crashed (signal ABRT)" in result.stderr
    assert files(tmp_path) == before


# verify -------------------------------------------------------------------------------------------------------------


def drop(report: dict[str, Any]) -> None:
    del report["removed"][0]


def role(report: dict[str, Any]) -> None:
    report["removed"][0]["role"] = "divisor"


def group(report: dict[str, Any]) -> None:
    for row in report["removed"]:
        row["group"] += 7


def other_positions(report: dict[str, Any]) -> None:
    row = report["removed"][0]
    row["removed"] = sorted(set(range(16)) - set(row["removed"]))


def repaired(report: dict[str, Any]) -> None:
    report["repaired"] = ["ghost"]


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], int]] = {
    "an entry left out": (drop, 3),
    "another role": (role, 3),
    "another group": (group, 3),
    "other positions": (other_positions, 3),
    "nothing removed": (lambda r: r.update(removed=[]), 3),
    "repaired what is not there": (repaired, 3),
    "no such initializer": (lambda r: r["removed"][0].update(initializer="ghost"), 2),
    "no such axis": (lambda r: r["removed"][0].update(axis=9), 2),
    "no such position": (lambda r: r["removed"][0].update(removed=[99]), 2),
    "negative position": (lambda r: r["removed"][0].update(removed=[-1]), 2),
    "graph output": (lambda r: r["removed"][0].update(initializer="b2", axis=0, removed=[0]), 3),
    "another schema": (lambda r: r.update(schema=99), 2),
    "an unknown key": (lambda r: r.update(extra=1), 2),
    "a wrong type": (lambda r: r["removed"][0].update(removed="all of it"), 2),
    "a wrong recipe": (lambda r: r["recipe"].update(remove=3), 2),
    "another dense model": (lambda r: r["dense"].update(sha256="0" * 64), 3),
}


@pytest.fixture
def pruned(model: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    out, report = tmp_path / "o.onnx", tmp_path / "r.json"
    assert run("prune", model, "-o", out, "--ratio", 0.5, "--no-measure", "--report", report).exit_code == 0
    return model, out, report


@pytest.mark.parametrize("name", FORGED)
def test_verify_catches_a_forged_report(name: str, pruned: tuple[Path, Path, Path]) -> None:
    model, out, report = pruned
    change, code = FORGED[name]
    data = json.loads(report.read_text())
    change(data)
    report.write_text(json.dumps(data))
    result = run("verify", model, out, "--plan", report)
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1


def value(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))


CHANGED: dict[str, Callable[[onnx.ModelProto], object]] = {
    "value": value,
    "extra initializer": lambda m: m.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "extra")),
    "operator": lambda m: setattr(m.graph.node[1], "op_type", "Sigmoid"),
    "attribute": lambda m: m.graph.node[0].attribute.append(onnx.helper.make_attribute("alpha", 2.0)),
    "node": lambda m: m.graph.node.append(onnx.helper.make_node("Relu", ["y"], ["z"])),
    "output shape": lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 4),
    "opset": lambda m: setattr(m.opset_import[0], "version", 18),
}


@pytest.mark.parametrize("name", CHANGED)
def test_verify_catches_a_changed_model(name: str, pruned: tuple[Path, Path, Path]) -> None:
    model, out, report = pruned
    proto = onnx.load(out)
    CHANGED[name](proto)
    onnx.save(proto, out)
    result = run("verify", model, out, "--plan", report)
    assert result.exit_code == 3, result.output
    assert result.stderr.count("\n") == 1


def test_verify_takes_other_values_only_where_the_report_lists_them(pruned: tuple[Path, Path, Path]) -> None:
    model, out, report = pruned
    proto = onnx.load(out)
    value(proto)
    onnx.save(proto, out)
    data = json.loads(report.read_text())
    data["repaired"] = [proto.graph.initializer[0].name]
    report.write_text(json.dumps(data))
    assert run("verify", model, out, "--plan", report).exit_code == 0


# Recipes ------------------------------------------------------------------------------------------------------------


def test_a_recipe_says_what_the_command_line_says_which_wins(model: Path, tmp_path: Path) -> None:
    saved, first, second = tmp_path / "r.yaml", tmp_path / "a.onnx", tmp_path / "b.onnx"
    given = ["--target", "macs=0.6", "--round-to", 1, "--input-shape", "x:4x5", "--no-measure"]
    assert run("prune", model, "-o", first, *given, "--save-recipe", saved).exit_code == 0
    assert run("prune", model, "-o", second, "--recipe", saved).exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    result = run("prune", model, "-o", tmp_path / "c.onnx", "--recipe", saved, "--ratio", 0.25, "--json")
    recipe = json.loads(result.stdout)["recipe"]
    assert (recipe["ratio"], recipe["round-to"], "target" in recipe) == (0.25, "1", False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ratio: 0.5\nratio: 0.4", "'ratio' is given twice"),
        ("ratoi: 0.5", "ratoi: unknown option"),
        ("ratio: .nan", "ratio: "),
        ("ratio: '0.5'", "ratio: "),
        ("ratio: 0.5\nmin-keep: 1.5", "min-keep: "),
        ("- 1", "one mapping"),
        ("", "one mapping"),
        ("ratio: [", "line 1"),
        ("a: &a [*a]", "aliases"),
        ("x: !!python/object/apply:os.system ['touch canary']", "python/object"),
        ("{" * 3000, "not a recipe"),
    ],
)
def test_bad_recipes_are_one_line_and_exit_2(text: str, words: str, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    result = run("prune", model, "-o", tmp_path / "o.onnx", "--recipe", recipe)
    assert result.exit_code == 2, result.output
    assert "r.yaml" in result.stderr
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("canary").exists()
    assert sorted(files(tmp_path)) == ["m.onnx", "r.yaml"]


# Names and reports --------------------------------------------------------------------------------------------------


def test_what_is_shown_is_short_and_cannot_move_the_cursor() -> None:
    assert shown("a\x1b[31m\n") == "a\\x1b[31m\\n"
    assert len(shown("x" * 60_000)) == 80
    assert shown_path("/long" * 99 + "/net.onnx").endswith("/net.onnx")
    error = InternalError("line\nline \x1b " + "y" * 9999, file="f\n", object="o\x07" * 99)
    assert error.line().isprintable()
    assert len(error.line()) < 700


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_reports_escape_what_a_model_calls_itself(suffix: str, tmp_path: Path) -> None:
    names = ("x", "w1", "b1", "w2", "b2", "h", "r", "</td><script>|`*_\x1b[0m")
    path, report = tmp_path / "m.onnx", tmp_path / f"r{suffix}"
    path.write_bytes(mlp(names).SerializeToString())
    assert run("prune", path, "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--report", report).exit_code == 0
    text = report.read_text()
    assert "\x1b" not in text
    if suffix == ".json":
        assert json.loads(text)["pruned"]["latency"]["cpu_ms"] > 0
    else:
        assert "<script>" not in text
        assert "latency" in text


def test_the_library_says_the_same(model: Path, tmp_path: Path) -> None:
    result = pipeline.prune(model, tmp_path / "o.onnx", target={"macs": 0.5}, measure=False, report=tmp_path / "r.json")
    assert result.report.pruned.macs <= 0.5 * result.report.dense.macs
    digest = hashlib.sha256((tmp_path / "o.onnx").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "r.json").read_text())["pruned"]["sha256"] == digest
