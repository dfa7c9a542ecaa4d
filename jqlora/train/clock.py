"""Time spent training, apart from everything around it."""

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent training: no first call of a shape, which compiles, nor evaluating or saving.

    ``seconds`` goes on from ``before``, what earlier processes of the same run spent.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.compile_seconds = 0.0
        self.seconds = before
        self._last: float | None = None
        self._compiled: set[Hashable] = set()

    @contextmanager
    def call(self, shape: Hashable) -> Iterator[None]:
        """Around each call of the step: the first one for a ``shape`` of batches compiles, or waits
        until a thread has, and the first of all starts the clock."""
        begin = time.perf_counter()
        yield
        if shape in self._compiled:
            return
        self._compiled.add(shape)
        elapsed = time.perf_counter() - begin
        self.compile_seconds += elapsed
        self._last = begin + elapsed if self._last is None else self._last + elapsed

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
