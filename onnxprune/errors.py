"""What goes wrong, as values with fields: tests and `--json` read the fields, people read the line."""

from __future__ import annotations

NAME_LIMIT = 80


def shown(name: object) -> str:
    """A name from a model as it may be printed: control characters escaped, cut at 80 characters."""
    text = str(name).encode("unicode_escape").decode("ascii") if not str(name).isprintable() else str(name)
    return text if len(text) <= NAME_LIMIT else text[: NAME_LIMIT - 3] + "..."


class PruneError(Exception):
    """A failure that the user sees as one line: `<file>: <object>: <what is wrong>; <what to do>`."""

    code = 5

    def __init__(self, message: str, *, file: object = "", object: str = "") -> None:
        self.message = message
        self.file = shown(file) if file else ""
        self.object = object
        super().__init__(": ".join(part for part in (self.file, object, message) if part))

    def fields(self) -> dict[str, object]:
        """The error object of `--json`."""
        return {"code": self.code, "file": self.file, "object": self.object, "message": self.message}


class InputError(PruneError):
    """The model, a file beside it or an argument is bad."""

    code = 2


class ImpossibleError(PruneError):
    """The input is fine, but what is asked cannot be had; the message says what can."""

    code = 3


class MachineError(PruneError):
    """Cannot read or write, out of memory or disk, over a time limit, a runtime is missing."""

    code = 4


class InternalError(PruneError):
    """Our bug, or a native library crashed."""

    code = 5
