"""The cache: entries are whole or absent, whatever happened to their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxprune.cache import Cache, key_of, opened
from onnxprune.errors import MachineError


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), key_of("what", 1, [2.5])
    assert cache.get("kind", key) is None
    cache.put("kind", key, b"first")
    cache.put("kind", key, b"second")
    assert Cache(tmp_path).get("kind", key) == b"second"
    assert cache.get("other", key) is None
    cache.put_number("kind", key, 0.1)
    assert cache.number("kind", key) == 0.1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [key]


def test_keys_differ_by_content() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert len({key_of(1), key_of(2), key_of("1"), key_of([1])}) == 4


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 40])
def test_a_damaged_entry_is_none(damage: bytes, tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), key_of("what")
    cache.put_number("kind", key, 3.0)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(damage)
    assert cache.get("kind", key) is None
    assert cache.number("kind", key) is None
    cache.put_number("kind", key, 4.0)
    assert cache.number("kind", key) == 4.0


def test_a_changed_bit_is_none_and_no_number_is_none(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), key_of("what")
    cache.put("kind", key, b"not a number")
    assert cache.number("kind", key) is None
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert cache.get("kind", key) is None


def test_a_folder_in_the_place_of_an_entry_costs_nothing(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), key_of("what")
    (tmp_path / "kind" / key[:2] / key).mkdir(parents=True)
    cache.put("kind", key, b"content")
    assert cache.get("kind", key) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(None, off=True)
    cache.put("kind", "key", b"content")
    assert cache.get("kind", "key") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert opened(None).folder == tmp_path / "onnxprune"


def test_a_folder_that_was_named_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cache"):
        opened(str(tmp_path / "file"))
    assert opened(str(tmp_path / "new" / "folder")).folder == tmp_path / "new" / "folder"
