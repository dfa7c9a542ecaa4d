"""Time spent training, apart from everything around it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent training: neither the first call, which compiles, nor evaluating or saving.

    ``seconds`` goes on from ``before``, what earlier processes of the same run spent.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.compile_seconds = 0.0
        self.seconds = before
        self._last: float | None = None

    @contextmanager
    def first_call(self) -> Iterator[None]:
        """Around each call of the step: the first one compiles, and starts the clock."""
        begin = time.perf_counter()
        yield
        if self._last is None:
            self._last = time.perf_counter()
            self.compile_seconds = self._last - begin

    def step(self, tokens: int) -> float:
        """Count a finished step; returns its tokens per second."""
        now = time.perf_counter()
        elapsed = now - (self._last or now)
        self._last = now
        self.seconds += elapsed
        return tokens / elapsed if elapsed else 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        yield
        self._last = time.perf_counter()
