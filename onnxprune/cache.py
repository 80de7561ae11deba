"""What took long to find out, kept in files by what was asked: a run that was killed goes on where it stopped.

An entry is written whole or not at all, and carries a digest of itself: one that is damaged is as good as none. A
cache is a help, so a disk that is full costs no more than its help.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import MachineError
from onnxprune.types import Array

LARGEST = 1 << 30  # bytes of one entry


@dataclass(frozen=True)
class Cache:
    """Entries of some kinds in a folder; without a folder nothing is kept."""

    folder: Path | None = None

    def get(self, kind: str, key: str) -> bytes | None:
        """What was put there, or None where there is nothing that is whole."""
        if self.folder is None:
            return None
        try:
            with open(self._path(kind, key), "rb") as file:
                data = file.read(LARGEST + 1)
        except OSError:
            return None
        digest, content = data[:32], data[32:]
        return content if hashlib.sha256(content).digest() == digest else None

    def put(self, kind: str, key: str, content: bytes) -> None:
        """Keep an entry; the last one that is put under a key stays."""
        if self.folder is None or len(content) > LARGEST - 32:
            return
        path = self._path(kind, key)
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fresh.write_bytes(hashlib.sha256(content).digest() + content)
                os.replace(fresh, path)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise

    def number(self, kind: str, key: str) -> float | None:
        """A number that was put there."""
        with suppress(ValueError, TypeError):
            return float(self.get(kind, key) or "")
        return None

    def put_number(self, kind: str, key: str, number: float) -> None:
        """Keep a number."""
        self.put(kind, key, repr(float(number)).encode())

    def _path(self, kind: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / key[:2] / key


def key_of(*parts: Any) -> str:
    """A name for what is asked, by its content: anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def opened(folder: str | None, off: bool = False) -> Cache:
    """The cache in a folder, by default the user's, where one can be had. Raises MachineError for a folder named."""
    if off:
        return Cache()
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"the cache cannot be there: {error.strerror}", file=folder) from None
        return Cache(Path(folder))
    from platformdirs import user_cache_path

    return Cache(user_cache_path("onnxprune", appauthor=False))


@dataclass(frozen=True)
class Kept:
    """Arrays that a run computed, by what was asked; `about` names all that the answers depend on besides."""

    cache: Cache = Cache()
    about: str = ""

    def get(self, kind: str, *asked: Any) -> dict[str, Array] | None:
        """The arrays by name, or None where they are not there."""
        data = self.cache.get(kind, key_of(self.about, *asked))
        if data is None:
            return None
        with suppress(ValueError, OSError, zipfile.BadZipFile), np.load(BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
        return None

    def put(self, kind: str, arrays: Mapping[str, Array], *asked: Any) -> None:
        """Keep arrays."""
        if self.cache.folder is not None:
            file = BytesIO()
            np.savez(file, allow_pickle=False, **arrays)
            self.cache.put(kind, key_of(self.about, *asked), file.getvalue())


def versions(*packages: str) -> list[str]:
    """Of the packages that are installed."""
    found = []
    for name in packages:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


def digest(feeds: Sequence[Mapping[str, Array]]) -> str:
    """A name for samples by their content."""
    total = hashlib.sha256()
    for feed in feeds:
        for name, array in sorted(feed.items()):
            total.update(json.dumps([name, str(array.dtype), array.shape]).encode())
            total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()
