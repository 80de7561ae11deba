"""The trained models of the zoo folder: pruned and proven."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxprune.cli import main

ZOO = os.environ.get("ONNXPRUNE_ZOO", "")
FILES = sorted(Path(ZOO).glob("*/*.onnx")) if ZOO else []

pytestmark = [pytest.mark.zoo, pytest.mark.skipif(not FILES, reason="ONNXPRUNE_ZOO names no folder with models")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_prune_a_quarter(path: Path, tmp_path: Path) -> None:
    before = {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.parent.iterdir() if f.is_file()}
    out = tmp_path / "small.onnx"
    result = CliRunner().invoke(
        main, ["prune", str(path), "-o", str(out), "--ratio", "0.25", "--round-to", "1", "--no-measure", "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert out.exists()
    assert report["verification"]["proven"]
    assert not report["verification"]["unproven"]
    assert report["pruned"]["params"] < report["dense"]["params"]
    assert before == {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.parent.iterdir() if f.is_file()}
    plan = tmp_path / "report.json"
    plan.write_text(json.dumps(report))
    verified = CliRunner().invoke(main, ["verify", str(path), str(out), "--plan", str(plan), "--json"])
    assert verified.exit_code == 0, verified.output
