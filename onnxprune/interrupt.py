"""Ctrl-C and termination: one line and exit code 130, from before anything large is imported to the very end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

Handler = Callable[[int, object], object] | signal.Handlers
CODE = 130
AGAIN = 0.01  # seconds
SAID = "onnxprune: interrupted"


def hear(handler: Handler) -> None:
    """Let a handler take both signals, but for one that who started us has us ignore (nohup)."""
    for one in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(one) is not signal.SIG_IGN:
            signal.signal(one, handler)


def leave(signum: int, frame: object) -> None:
    """End at once: for as long as there is nothing to clean up."""
    os.write(2, f"{SAID}\n".encode())
    os._exit(CODE)


def unwind(signum: int, frame: object) -> None:
    """Raise KeyboardInterrupt, so that children end and temporary files go."""
    raise KeyboardInterrupt


def insist() -> None:
    """Raise an interrupt again that met a destructor, which nothing can be raised out of: Python would drop it."""

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            sys.__unraisablehook__(what)

    signal.signal(signal.SIGALRM, unwind)
    sys.unraisablehook = dropped
