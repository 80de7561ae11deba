"""Write the operator table of the README: python tools/op_table.py [--check]."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from onnxprune import ops

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- operators -->\n", "<!-- /operators -->\n"


def table() -> str:
    """One row for each rule, with all operators that share it."""
    by_rule: dict[str, list[str]] = defaultdict(list)
    for name, text in ops.known():
        by_rule[text].append(name)
    rows = sorted((", ".join(names), text) for text, names in by_rule.items())
    return "| operators | rule |\n| --- | --- |\n" + "".join(f"| {names} | {text} |\n" for names, text in rows)


def main() -> None:
    """Rewrite the table, or with --check exit 1 where it is stale."""
    text = README.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    fresh = before + START + table() + END + after
    if "--check" in sys.argv[1:]:
        sys.exit(0 if fresh == text else "the operator table of README.md is stale: run tools/op_table.py")
    README.write_text(fresh)


if __name__ == "__main__":
    main()
