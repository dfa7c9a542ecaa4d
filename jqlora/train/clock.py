"""Time spent training, apart from everything around it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent training: neither the first call, which compiles, nor evaluating or saving."""

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self.seconds = 0.0
        self._tokens = 0
        self._last: float | None = None

    @property
    def mean_rate(self) -> float:
        return self._tokens / self.seconds if self.seconds else 0.0

    @contextmanager
    def first_call(self) -> Iterator[None]:
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
        self._tokens += tokens
        return tokens / elapsed if elapsed else 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield
        self._last = time.perf_counter()
