"""sensitivity: one group at a time, errors that a run of one's own finds too, and the same figures in every form."""

from __future__ import annotations

import csv
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper
from zoo import ZOO

from onnxprune.cli import main
from onnxprune.errors import InputError
from onnxprune.runtime import ort
from onnxprune.sensitivity import COLUMNS, sensitivity

RNG = np.random.default_rng(3)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["sensitivity", *map(str, arguments)])


def model(folder: Path, name: str = "residual CNN") -> Path:
    onnx.save(ZOO[name](), folder / "m.onnx")
    return folder / "m.onnx"


def data(path: Path, count: int = 6) -> Path:
    """Samples for the inputs of a model of the zoo, which leave their first axis open."""
    arrays = {}
    for value in onnx.load(path).graph.input:
        sizes = [dim.dim_value or 5 for dim in value.type.tensor_type.shape.dim]
        arrays[value.name] = RNG.standard_normal((count, *sizes[1:])).astype(np.float32)
    np.savez(path.parent / "c.npz", **arrays)
    return path.parent / "c.npz"


def masked(path: Path, group: dict[str, Any], keep: np.ndarray) -> onnx.ModelProto:
    """The dense model with every slice of the units that go at zero, by the members that `inspect` lists."""
    found = onnx.load(path)
    goes = np.flatnonzero(~keep)
    for member in group["members"]:
        for tensor in found.graph.initializer:
            if tensor.name == member["initializer"]:
                array = numpy_helper.to_array(tensor).copy()
                assert array.shape[member["axis"]] == len(keep)
                np.moveaxis(array, member["axis"], 0)[goes] = 0
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return found


def test_the_error_is_that_of_a_model_with_zeros(tmp_path: Path) -> None:
    path = model(tmp_path)
    samples = data(path)
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).stdout)
    groups = {group["id"]: group for group in inspected["groups"]}
    feeds = [{name: array[k : k + 1] for name, array in np.load(samples).items()} for k in range(6)]
    wanted = ort.run(str(path), feeds)
    result = run(path, "--calibration", samples, "--criterion", "mag", "--levels", 0.5, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len({row["group"] for row in rows}) == len(rows) == 2
    for row in rows:
        group = groups[row["group"]]
        kept = keep_of(path, samples, row["group"])
        assert int((~kept).sum()) == row["removed"] == group["units"] // 2
        onnx.save(masked(path, group, kept), tmp_path / "masked.onnx")
        found = ort.run(str(tmp_path / "masked.onnx"), feeds)
        gap = sum(float(((a[k] - b[k]) ** 2).sum()) for a, b in zip(found, wanted, strict=True) for k in a)
        size = sum(float((b[k] ** 2).sum()) for b in wanted for k in b)
        assert row["error"] == pytest.approx(np.sqrt(gap / size), rel=1e-4)
        assert row["error"] > 0


def keep_of(path: Path, samples: Path, group: int) -> np.ndarray:
    """bool[units]: what the library call chooses at half of a group, found again from its importance."""
    from onnxprune import choose, pipeline, select
    from onnxprune.recipe import Options
    from onnxprune.recovery import Recovery
    from onnxprune.worker import Worker

    options = Options(ratio=0.5, criterion="mag", calibration=str(samples), reconstruct="none")
    opened = pipeline.opened(path, [None], [], options)
    with Worker() as worker:
        recovery = Recovery(opened.analysis, opened.calibration, options, worker)
        groups = choose.groups_of(opened.analysis, options)
        groups, importance = choose.score(opened.analysis, groups, options, recovery.evidence(groups))
    return select.by_ratio(groups, importance, 0.5, select.Rounding(1)).keep[group]


def test_nothing_removed_costs_and_gains_nothing(tmp_path: Path) -> None:
    found = sensitivity(model(tmp_path), levels=(0, 0.01))
    assert found.rows
    for row in found.rows:
        assert (row.removed, row.error, row.macs, row.params) == (0, 0, 0, 0)


def test_what_is_removed_and_gained_rises_with_the_level(tmp_path: Path) -> None:
    found = sensitivity(model(tmp_path), levels=(0.75, 0.25, 0.5))
    for group in {row.group for row in found.rows}:
        rows = [row for row in found.rows if row.group == group]
        assert [row.level for row in rows] == [0.25, 0.5, 0.75]
        assert [row.removed for row in rows] == [int(row.level * row.units) for row in rows]
        assert all(a.macs < b.macs and a.params < b.params for a, b in pairwise(rows))
    assert all(row.error > 0 and row.repaired is None and row.latency is None for row in found.rows)


def test_gains_are_those_that_prune_reports(tmp_path: Path) -> None:
    """A model with the other groups ignored, pruned by the same ratio, costs what the row says."""
    path = model(tmp_path, "pre-norm blocks")
    found = sensitivity(path, levels=(0.5,))
    row = found.rows[-1]
    others = {name for other in found.rows if other.group != row.group for name in other.nodes} - set(row.nodes)
    ignored = [part for name in sorted(others) for part in ("--ignore", name)]
    report = tmp_path / "r.json"
    result = CliRunner().invoke(
        main,
        ["prune", str(path), "-o", str(tmp_path / "s.onnx"), "--ratio", "0.5", "--round-to", "1", "--no-measure",
         "--report", str(report), *ignored],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert 1 - written["pruned"]["macs"] / written["dense"]["macs"] == pytest.approx(row.macs)
    assert 1 - written["pruned"]["params"] / written["dense"]["params"] == pytest.approx(row.params)
    assert written["quality"]["relative-error"] == pytest.approx(row.error, rel=1e-3)


def test_table_csv_and_json_agree(tmp_path: Path) -> None:
    path, file = model(tmp_path), tmp_path / "s.csv"
    result = run(path, "--calibration", data(path), "--csv", file, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    with file.open(newline="") as text:
        listed = list(csv.DictReader(text))
    assert tuple(listed[0]) == COLUMNS
    assert len(listed) == len(rows)
    for line, row in zip(listed, rows, strict=True):
        for name in ("level", "error", "macs", "params"):
            assert float(line[name]) == row[name]
        assert (int(line["group"]), int(line["removed"]), line["kind"]) == (row["group"], row["removed"], row["kind"])
        assert line["latency"] == line["repaired"] == ""
        assert line["nodes"].split() == row["nodes"]
    shown = [line.split() for line in run(path, "--calibration", tmp_path / "c.npz").stdout.splitlines()]
    cells = [line for line in shown if line and line[0].isdigit()]
    assert [line[6] for line in cells] == [f"{row['error']:.3g}" for row in rows]
    assert [line[7] for line in cells] == [f"{row['macs']:.1%}" for row in rows]


@pytest.mark.parametrize(
    ("name", "more", "kinds"),
    [
        ("pre-norm blocks", ("--remove", "layers"), {"layers"}),
        ("heads, three projections", (), {"heads"}),
        ("width under LayerNorm and softmax over channels", ("--remove", "all"), {"channels"}),
        (
            "width under LayerNorm and softmax over channels",
            ("--remove", "all", "--approximate"),
            {"channels", "width"},
        ),
    ],
)
def test_kinds(tmp_path: Path, name: str, more: tuple[str, ...], kinds: set[str]) -> None:
    result = run(model(tmp_path, name), *more, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["kind"] for row in rows} == kinds
    assert all((row["error"] > 0) == (row["removed"] > 0) for row in rows)


def test_random_inputs_are_named(tmp_path: Path) -> None:
    result = run(model(tmp_path))
    assert "random inputs" in result.stderr
    assert "random inputs" in result.stdout
    result = run(tmp_path / "m.onnx", "--calibration", data(tmp_path / "m.onnx"))
    assert result.stderr == ""
    assert "calibration" in result.stdout


def test_repair_is_judged_on_what_it_was_not_fitted_to(tmp_path: Path) -> None:
    path = model(tmp_path)
    result = run(path, "--calibration", data(path, 64), "--reconstruct", "sequential", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["held_out"]
    assert found["inputs"] == 4
    before, after = (np.array([row[key] for row in found["rows"]]) for key in ("error", "repaired"))
    assert after.mean() < before.mean()


def test_latency_where_it_is_asked_for(tmp_path: Path) -> None:
    result = run(model(tmp_path), "--backend", "cpu", "--levels", 0.5, "--cache", tmp_path / "cache", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["backend"] == "cpu"
    assert found["dense"]["latency"] > 0
    assert all(row["latency"] <= 1 for row in found["rows"])


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_plots(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = model(tmp_path)
    changed = onnx.load(path)
    for node in changed.graph.node:
        node.name = f"$<b>{node.output[0]}_^&\u4e00"  # neither markup nor mathematics, in a script that fonts lack
    onnx.save(changed, path)
    written = []
    for _ in range(2):
        result = run(path, "--plot", tmp_path / f"p.{suffix}", "--force", "--levels", "0.25,0.5")
        assert result.exit_code == 0, result.output
        written.append((tmp_path / f"p.{suffix}").read_bytes())
    assert written[0] == written[1]
    assert written[0].startswith({"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype html>"}[suffix])
    assert b"<b>" not in written[0]


def test_a_plot_without_what_draws_it_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(model(tmp_path), "--plot", tmp_path / "p.png")
    assert result.exit_code == 4
    assert "onnxprune[plot]" in result.stderr
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--levels", "half"), 2),
        (("--levels", ""), 2),
        (("--levels", "nan"), 2),
        (("--levels", "0.5,1"), 2),
        (("--levels", "-0.1"), 2),
        (("--plot", "p.jpg"), 2),
        (("--csv", "nowhere/s.csv"), 2),
        (("--csv", "m.onnx"), 2),
        (("--csv", "p.svg", "--plot", "p.svg"), 2),
        (("--remove", "everything"), 2),
        (("--remove", "experts"), 3),
        (("--reconstruct", "sequential"), 2),
        (("--reconstruct", "nothing-like-it"), 2),
        (("--criterion", "wanda-sp"), 2),
        (("--backend", "abacus"), 2),
        (("--calibration", "absent.npz"), 2),
        (("--cache", "d", "--no-cache"), 2),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], code: int
) -> None:
    path = model(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = path.read_bytes()
    result = run("m.onnx", *more)
    assert result.exit_code == code, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == before


def test_files_are_replaced_only_with_force(tmp_path: Path) -> None:
    path, file = model(tmp_path), tmp_path / "s.csv"
    file.write_text("mine")
    assert run(path, "--csv", file).exit_code == 2
    assert file.read_text() == "mine"
    assert run(path, "--csv", file, "--force").exit_code == 0
    assert file.read_text() != "mine"
    with pytest.raises(InputError):
        sensitivity(path, csv=file)
