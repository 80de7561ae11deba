"""What is begun before it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def ahead(function: Callable[[], T]) -> Future[T]:
    """What a function will answer, or raise; its thread does not keep the program from ending."""
    found = Future[T]()

    def run() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found
