"""Being asked to stop, at a moment that suits the loop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred_signals() -> Iterator[list[str]]:
    """Collect SIGINT and SIGTERM by name instead of dying of them; a second SIGINT interrupts."""
    caught: list[str] = []

    def remember(number: int, _frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, remember) for kind in kinds}
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
