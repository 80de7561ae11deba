"""What is written about the code is true of the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_operator_table_of_the_readme_is_fresh() -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "tools" / "op_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_every_verb_of_the_readme_exists() -> None:
    from onnxprune.cli import main

    text = (ROOT / "README.md").read_text()
    used = {line.split()[1] for line in text.splitlines() if line.strip().startswith("onnxprune ")}
    assert used
    assert used <= set(main.commands)


def test_every_promise_has_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = {found[1]: found[2] for found in re.finditer(r"^\| (P\d+) \|.*?\|(.*)\|$", text, re.M)}
    assert list(rows) == [f"P{k}" for k in range(1, 16)]
    for promise, cell in rows.items():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)
        assert named, promise
        for file, name in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (promise, name)
