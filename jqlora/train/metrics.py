"""``metrics.jsonl``: one JSON object a line, flushed as it is written, rewound when a run resumes.

After a kill the file may hold rows past the last checkpoint, and half a line. Opening it for a run
that continues from step ``s`` drops every row after ``s``, so that an interrupted and resumed run
leaves the same file as an uninterrupted one, apart from the fields in :data:`WALL_CLOCK`.
"""

import json
import os
from pathlib import Path
from typing import Any

from jqlora.errors import SaveError
from jqlora.io.atomic import atomic_write_text

WALL_CLOCK = frozenset({"seconds", "tokens_per_second"})
"""Fields that tell of the machine and not of the training."""

Row = dict[str, Any]


class MetricsLog:
    """Appends rows; each has ``step`` and ``kind`` (``train`` or the name of an evaluation)."""

    def __init__(self, path: str | Path, *, through: int | None = None):
        """Open ``path``, keeping the rows of steps up to ``through`` (none where it is None)."""
        self.path = Path(path)
        rows = [] if through is None else read_metrics(self.path)
        kept = [row for row in rows if through is not None and row["step"] <= through]
        atomic_write_text(self.path, "".join(_line(row) for row in kept))
        self._file = open(self.path, "a")  # noqa: SIM115 - closed by close()

    def write(self, row: Row) -> None:
        """Append one row; it is with the operating system when this returns."""
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise SaveError(f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Return when all rows are on the disk: a checkpoint must not be newer than they are."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[Row]:
    """All whole rows of a file, oldest first; a last line cut off by a kill is left out."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
