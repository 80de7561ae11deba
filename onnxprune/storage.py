"""Placeholder until the full reader and writer land."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxprune.errors import InputError


@dataclass(frozen=True)
class Source:
    path: Path
    sha256: str
    bytes: int
    external: bool
    files: tuple[Path, ...]


def read_bytes(path: str | Path) -> bytes:
    return Path(path).read_bytes()


def read_model(path: str | Path) -> tuple[ir.Model, Source]:
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", file=path)
    return ir.load(path), Source(path, digest((path,)), path.stat().st_size, False, (path,))


def digest(files: tuple[Path, ...]) -> str:
    h = hashlib.sha256()
    for f in files:
        h.update(f.read_bytes())
    return h.hexdigest()


def check_output(path: str | Path, source: Source | None, *, force: bool) -> Path:
    path = Path(path)
    if path.exists() and not force:
        raise InputError("exists; use --force", file=path)
    return path


def write_model(
    model: ir.Model, path: Path, *, force: bool, external: bool, prove: Callable[[Path], None] | None = None
) -> tuple[Path, ...]:
    temp = path.with_suffix(".tmp.onnx")
    ir.save(model, temp)
    if prove:
        prove(temp)
    os.replace(temp, path)
    return (path,)


def write_text(path: Path, text: str, *, force: bool = True) -> None:
    path.write_text(text)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    data = np.load(path)
    return {"": data} if isinstance(data, np.ndarray) else dict(data)
