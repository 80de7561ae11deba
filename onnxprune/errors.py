"""What goes wrong, as values with fields: tests and `--json` read the fields, people read the line."""

from __future__ import annotations

from typing import Self

NAME_LIMIT = 80
LINE_LIMIT = 500  # characters of a message


def printable(text: object) -> str:
    """Text with what a terminal would act upon escaped."""
    found = str(text)
    return found if found.isprintable() else found.encode("unicode_escape").decode("ascii")


def shown(name: object) -> str:
    """A name from a model as it may be printed: control characters escaped, cut at 80 characters."""
    text = printable(str(name)[: NAME_LIMIT + 1])
    return text if len(text) <= NAME_LIMIT else text[: NAME_LIMIT - 3] + "..."


def shown_path(path: object) -> str:
    """A path likewise, cut at the front: its end is what tells files apart."""
    text = printable(str(path)[-NAME_LIMIT - 1 :])
    return text if len(text) <= NAME_LIMIT else "..." + text[3 - NAME_LIMIT :]


class PruneError(Exception):
    """A failure that the user sees as one line: `<file>: <object>: <what is wrong>; <what to do>`."""

    code = 5

    def __init__(self, message: str, *, file: object = "", object: str = "") -> None:
        text = printable(" ".join(message.split()))
        self.message = text if len(text) <= LINE_LIMIT else text[: LINE_LIMIT - 3] + "..."
        self.file = shown_path(file) if file else ""
        self.object = object
        super().__init__(self.line())

    def about(self, file: object) -> Self:
        """The same error, of what is in a file."""
        self.file = shown_path(file)
        self.args = (self.line(),)
        return self

    def line(self) -> str:
        """`<file>: <object>: <message>`, safe to print."""
        return ": ".join(part for part in (self.file, shown(self.object), self.message) if part)

    def fields(self) -> dict[str, object]:
        """The error object of `--json`."""
        return {"code": self.code, "file": self.file, "object": shown(self.object), "message": self.message}


class InputError(PruneError):
    """The model, a file beside it or an argument is bad."""

    code = 2


class UnloadableError(InputError):
    """ONNX Runtime refuses the model, whatever its inputs are."""


class ImpossibleError(PruneError):
    """The input is fine, but what is asked cannot be had; the message says what can."""

    code = 3


class MachineError(PruneError):
    """Cannot read or write, out of memory or disk, over a time limit, a runtime is missing."""

    code = 4


class LateError(MachineError):
    """Over a time limit."""


class InternalError(PruneError):
    """Our bug, or a native library crashed."""

    code = 5


def ours(error: Exception) -> PruneError:
    """Whatever went wrong, as one of ours; what caused it is its cause."""
    if isinstance(error, PruneError):
        return error
    found: PruneError
    if isinstance(error, MemoryError):
        found = MachineError("out of memory")
    elif isinstance(error, OSError):
        found = MachineError(error.strerror or str(error), file=error.filename or "")
    else:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        found = InternalError(f"{text}; this is a bug, please report it (--debug shows where)")
    found.__cause__ = error
    return found
