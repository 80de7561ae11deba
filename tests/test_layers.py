"""Who imports whom: the import rules of the package as tables, held by one walk over the syntax tree of each module.

A module goes by its name inside the package: `dims`, `ops.linear`; `__init__` is the package itself. `ops.*` in a
table stands for every module of that folder, so that a new op family or pass needs no line here.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "onnxprune"

# Lowest first. A module imports only from its own row and the rows above it.
LAYERS = (
    ("errors", "types", "ahead", "interrupt", "limits"),
    ("ops", "ops.*", "plugin", "lsq", "codes", "budget", "greedy", "passes", "passes.*"),
    ("indexing", "outcome", "cache", "interface", "layouts"),
    ("relate",),
    ("dims", "groups", "branches", "select", "cost", "infer", "quality"),
    ("probes",),
    ("wire", "weights", "reading", "storage", "model", "rewrite", "report", "feeds"),
    ("worker", "runtime", "runtime.*", "measure", "bfloat"),
    ("masked", "bounds", "fold", "rms"),
    ("verify",),
    ("operators", "chains", "sites"),
    ("analysis", "prove", "recipe", "calibrate", "widths", "flow", "nm", "precision", "running"),
    ("evidence", "bases", "rows", "parts", "layerwise", "reconstruct", "timing"),
    ("allocate", "pace"),
    ("recovery",),
    ("choose",),
    ("account",),
    ("sparse",),
    ("pipeline", "batch", "export", "engines", "realize", "sparsify", "sensitivity", "verbs", "audit"),
    ("cli", "__init__", "__main__"),
)

# What these modules may import from the package; the others, any module that is not higher, but no pass.
ONLY = {
    "ops": ("types",),
    "ops.*": ("types", "ops"),
    "passes": (),
    "passes.*": ("plugin", "types", "lsq", "budget", "greedy"),
}
PLUGINS = ("passes", "passes.*")  # found by entry point, imported by nobody

# Every package from outside that may be imported, and by whom. What is not here is imported nowhere: no torch.
OUTSIDE = {
    "numpy": ("*",),
    "scipy": ("dims", "lsq", "passes.*"),
    "networkx": ("dims",),
    "google": ("reading",),  # protobuf
    "onnx": (
        "reading",
        "storage",
        "model",
        "rewrite",
        "verify",
        "infer",
        "outcome",
        "flow",
        "running",
        "precision",
        "timing",
        "runtime.tensorrt",
    ),
    "onnx_ir": (
        "weights",
        "reading",
        "storage",
        "model",
        "rewrite",
        "verify",
        "infer",
        "outcome",
        "probes",
        "feeds",
        "audit",
        "calibrate",
        "masked",
        "fold",
        "rms",
        "operators",
        "chains",
        "sites",
        "flow",
        "running",
        "bases",
        "reconstruct",
        "pace",
        "precision",
        "nm",
        "bfloat",
    ),
    "onnxruntime": ("runtime.ort",),
    "platformdirs": ("cache",),
    "openvino": ("runtime.openvino",),
    "tensorrt": ("runtime.tensorrt",),
    "tensorrt_rtx": ("runtime.tensorrt",),
    "onnx_graphsurgeon": ("runtime.tensorrt",),
    "pydantic": ("report", "recipe"),
    "yaml": ("recipe",),
    "click": ("cli",),
    "rich": ("cli",),
    "matplotlib": ("sensitivity",),
}

# May import a name that the source does not spell out: public names, op families, what a child process is to call.
COMPUTED = ("__init__", "ops", "worker")
PRINTERS = ("cli",)


def modules() -> dict[str, Path]:
    """{module: file} of the package, passes/ through its link."""
    found = {}
    for folder, _, files in os.walk(ROOT / PACKAGE, followlinks=True):
        for file in (Path(folder, name) for name in files if name.endswith(".py")):
            parts = file.relative_to(ROOT / PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)] = file
    return found


MODULES = modules()


def key(module: str, table: Collection[str]) -> str | None:
    """The entry of a table that speaks of a module: its own, its folder's, or the one for all."""
    folder = module.rpartition(".")[0]
    return next((k for k in (module, f"{folder}.*" if folder else "", "*") if k in table), None)


def layer(module: str) -> int | None:
    """The row of LAYERS that a module stands in."""
    return next((k for k, row in enumerate(LAYERS) if key(module, row)), None)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, nested or not; "." for a relative one, "" for one by a computed name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.ImportFrom():
                yield node.lineno, "."
            case ast.Call(func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module")):
                match node.args:
                    case [ast.Constant(value=str(name)), *_]:
                        yield node.lineno, name
                    case _:
                        yield node.lineno, ""


def top(name: str) -> str:
    """The outermost package of a dotted name."""
    return name.partition(".")[0]


def within(name: str) -> str:
    """The module of the package that a dotted name leads to."""
    parts = name.split(".")[1:]
    known = MODULES.keys() | {module for row in LAYERS for module in row}
    found = (".".join(parts[:k]) for k in range(len(parts), 0, -1))
    return next((module for module in found if module in known), "__init__")


def complaint(module: str, name: str) -> str | None:
    """Why a module may not import a name; None if it may."""
    package = top(name)
    if not name:
        return None if module in COMPUTED else "imports a computed name"
    if not package:
        return "imports relatively; write the whole name"
    if package == "passes":
        return f"imports {name} past the link; every class would be loaded twice"
    if package in sys.stdlib_module_names:
        return None
    if package != PACKAGE:
        return None if key(module, OUTSIDE.get(package, ())) else f"imports {package}, which is not its business"
    target = within(name)
    if (entry := key(module, ONLY)) is not None:
        return None if target in ONLY[entry] else f"imports {target}; allowed: {', '.join(ONLY[entry]) or 'nothing'}"
    if key(target, PLUGINS):
        return f"imports {target}; passes are found by entry point"
    mine, other = layer(module), layer(target)
    if mine is None or other is None:
        return f"imports {target}, and one of the two has no layer"
    return f"imports {target}, which is higher" if other > mine else None


def complaints(module: str, source: str) -> list[str]:
    """What is wrong with a module's imports and prints, one line each."""
    tree = ast.parse(source)
    found = {(line, text) for line, name in imports(tree) if (text := complaint(module, name))}
    if module not in PRINTERS:
        found |= {(n.lineno, "prints") for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "print"}
    return [f"{module}:{line} {text}" for line, text in sorted(found)]


def test_every_module_has_a_layer() -> None:
    assert [module for module in MODULES if layer(module) is None] == []


def test_every_line_of_the_tables_speaks_of_a_module() -> None:
    tables = [*LAYERS, ONLY, PLUGINS, COMPUTED, PRINTERS, *OUTSIDE.values()]
    named = {entry for table in tables for entry in table}
    assert named - {key(module, {entry}) for module in MODULES for entry in named} == set()


def test_modules_import_what_they_may() -> None:
    assert "\n".join(line for module, file in MODULES.items() for line in complaints(module, file.read_text())) == ""


def test_no_module_calls_back() -> None:
    order: TopologicalSorter[str] = TopologicalSorter()
    for module, file in MODULES.items():
        names = [name for _, name in imports(ast.parse(file.read_text())) if top(name) == PACKAGE]
        order.add(module, *{within(name) for name in names} - {module})
    order.prepare()  # raises CycleError, which names the cycle


def test_passes_is_a_link() -> None:
    link = ROOT / PACKAGE / "passes"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "passes"


@pytest.mark.parametrize("folder", ["tests", "tools", "models"])
def test_nobody_imports_passes_past_the_link(folder: str) -> None:
    trees = {file.name: ast.parse(file.read_text()) for file in (ROOT / folder).rglob("*.py")}
    found = [f"{file}:{line}" for file, tree in trees.items() for line, name in imports(tree) if top(name) == "passes"]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("types", "import onnxprune.dims"),
        ("dims", "from onnxprune import model"),
        ("dims", "from onnxprune.model import view"),
        ("dims", "from onnxprune import prune"),
        ("dims", "from onnxprune.passes.mag import Magnitude"),
        ("dims", "from .types import Axis"),
        ("dims", "import passes.mag"),
        ("dims", "def lazy():\n    from passes import mag"),
        ("dims", "import torch"),
        ("dims", "from importlib import import_module\nimport_module('onnxruntime')"),
        ("dims", "import importlib\nimportlib.import_module(name)"),
        ("dims", "print(1)"),
        ("dims", "echo = print"),
        ("model", "import networkx as nx"),
        ("model", "import something_new"),
        ("pipeline", "import rich"),
        ("pipeline", "if True:\n    import onnxruntime"),
        ("ops.linear", "import onnx"),
        ("ops.linear", "from onnxprune.ops.mixing import softmax"),
        ("ops.linear", "from onnxprune.ops import mixing"),
        ("ops", "from onnxprune import plugin"),
        ("passes.mag", "from onnxprune.passes import uniform"),
        ("passes.mag", "from onnxprune.errors import PruneError"),
        ("passes.mag", "import onnx_ir"),
        ("unheard_of", "from onnxprune import types"),
    ],
)
def test_the_walk_rings(module: str, source: str) -> None:
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dims", "import networkx as nx\nfrom onnxprune import ops, types\nfrom onnxprune.ops import relations"),
        ("ops.linear", "import math\nimport numpy\nfrom onnxprune.ops import rule\nfrom onnxprune.types import Axis"),
        ("passes.mag", "import numpy as np\nfrom onnxprune.plugin import Weights\nfrom onnxprune.types import Group"),
        ("cli", "import rich\nfrom onnxprune import pipeline, prune\nprint(1)"),
        ("__init__", "from onnxprune.pipeline import prune"),
    ],
)
def test_the_walk_is_quiet(module: str, source: str) -> None:
    assert complaints(module, source) == []
