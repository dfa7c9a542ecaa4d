"""What a person sees while a run goes on: a bar on a terminal, plain lines anywhere else."""

import sys
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from jqlora.train.metrics import Row
from jqlora.train.usage import device_peak_bytes, host_peak_bytes, readable_bytes


class Progress:
    """Shows steps of ``total``, of which ``done`` were made before; messages go above the bar."""

    def __init__(self, total: int, *, done: int = 0, stream: TextIO | None = None):
        self.total = total
        self.stream = stream or sys.stderr
        self._first: Row | None = None  # the step that was shown first
        self._bar = None
        if self.stream.isatty():
            self._bar = tqdm(
                total=total, initial=done, file=self.stream, unit="step", dynamic_ncols=True
            )

    def step(self, rows: Sequence[Row], *, log: bool) -> None:
        """Show one step's rows, one for each adapter that it trained: always on the bar; as a line,
        where there is none, if ``log``."""
        row, losses = rows[0], sorted(row["loss"] for row in rows)
        self._first = self._first or row
        shown = f"loss {losses[0]:.4f}"
        shown += f" to {losses[-1]:.4f} of {len(rows)}" if len(rows) > 1 else ""
        rate = sum(row["tokens_per_second"] for row in rows)
        numbers = f"{shown} · {rate:.0f} tok/s · {self._memory()}"
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(numbers)
        elif log:
            print(
                f"step {row['step']}/{self.total} · {numbers} · {self._remaining(row)}",
                file=self.stream,
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _remaining(self, row: Row) -> str:
        first = self._first or row
        made = row["step"] - first["step"]
        if made == 0:
            return "time left unknown"
        seconds = (row["seconds"] - first["seconds"]) / made * (self.total - row["step"])
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"

    def _memory(self) -> str:
        device = device_peak_bytes()
        return f"{readable_bytes(host_peak_bytes() if device is None else device)} peak"
