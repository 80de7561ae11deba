"""What is written about the code is true of the code."""

from __future__ import annotations

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
