"""What is installed: the rows of `onnxprune list`."""

from __future__ import annotations

from onnxprune import ops, plugin, runtime


def rows(what: str) -> list[tuple[str, str]]:
    """(name, one line of help) of everything of a kind."""
    if what in plugin.KINDS:
        return [(name, plugin.help_of(cls)) for name, cls in plugin.available(what).items()]
    if what == "backends":
        return sorted(runtime.KNOWN.items())
    if what == "ops":
        return ops.known()
    return []
