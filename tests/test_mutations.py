"""Legal models with something wrong: a clean error, or a valid result; the input is as it was."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from mutations import mutated
from zoo import ZOO

from onnxprune.analysis import Analysis
from onnxprune.cli import main
from onnxprune.errors import PruneError
from onnxprune.types import Plan

EACH = 40
NAMES = list(ZOO)
onnxruntime.set_default_logger_severity(4)


def drawn(seed: int) -> tuple[str, list[str], bytes]:
    """(entry of the zoo, what was changed, the file)."""
    name = random.Random(seed).choice(NAMES)
    return name, *mutated(ZOO[name](), seed, 1 + seed % 2)


@pytest.mark.parametrize("first", range(0, 6 * EACH, EACH))
def test_a_mutated_model_is_analysed_or_refused(first: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for seed in range(first, first + EACH):
        name, changes, content = drawn(seed)
        path.write_bytes(content)
        try:
            analysis = Analysis(path)
            rng = np.random.default_rng(seed)
            keep = {group.id: rng.random(len(group.units)) < 0.6 for group in analysis.groups}
            assert analysis.costs.of(analysis.alive(analysis.settled(Plan(keep))))["params"] >= 0
        except PruneError as error:
            refused = error.code, str(error)
        except Exception as error:
            raise AssertionError((seed, name, changes)) from error
        else:
            continue
        assert refused[0] in (2, 3, 4), (seed, name, changes, refused)
        assert refused[1].isprintable() and len(refused[1]) < 600, (seed, name, changes, refused)


def pruned(seed: int, folder: Path) -> str:
    """What is wrong with how the command line takes a mutated model; nothing, as it should be."""
    _, _, content = drawn(seed)
    path, out = folder / "m.onnx", folder / "o.onnx"
    path.write_bytes(content)
    options = ["--ratio", "0.5", "--no-measure", "--timeout", "30", *(["--approximate"] if seed % 3 else [])]
    result = CliRunner().invoke(main, ["prune", str(path), "-o", str(out), *options])
    said = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    try:
        if path.read_bytes() != content:
            return "the input was changed"
        if result.exit_code not in (0, 2, 3, 4):
            return f"exit code {result.exit_code}: {result.stderr[-600:]}"
        if result.exit_code:
            if "Traceback" in result.output or len(said) != 1 or not said[0].startswith("onnxprune: error: "):
                return f"not one line: {result.output[-600:]}"
            return "" if {file.name for file in folder.iterdir()} == {"m.onnx"} else "something was left behind"
        if not out.exists():
            return "nothing was written"
        session, dense = onnxruntime.InferenceSession(out), onnx.load(path, load_external_data=False)
        if [o.name for o in session.get_outputs()] != [o.name for o in dense.graph.output]:
            return "other outputs"
        return ""
    finally:
        out.unlink(missing_ok=True)


@pytest.mark.fuzz
def test_mutated_models_are_pruned_or_refused(tmp_path: Path) -> None:
    first, count = (int(os.environ.get(f"ONNXPRUNE_FUZZ_{name}", value)) for name, value in (("FROM", 0), ("RUNS", 50)))
    found = {seed: why for seed in range(first, first + count) if (why := pruned(seed, tmp_path))}
    assert not found, found
