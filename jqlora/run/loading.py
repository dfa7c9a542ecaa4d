"""Progress of loading weights."""

import sys
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm


class LoadingBar:
    """What ``jq.load`` calls after each tensor: a bar on a terminal, else one line at the start."""

    def __init__(self, label: str, say: Callable[[str], None]):
        self._label, self._say = label, say
        self._bar: tqdm | None = None

    def __enter__(self) -> "LoadingBar":
        if not sys.stderr.isatty():
            self._say(f"loading {self._label}")
        return self

    def __call__(self, done: int, total: int, name: str) -> None:
        del name
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc=f"loading {self._label}", unit="tensor", leave=False)
        self._bar.update(done - self._bar.n)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
