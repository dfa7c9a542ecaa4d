"""Texts with a label: GLUE's tasks and what is written like them.

The files of GLUE's own site are tab-separated and never quoted: a quotation mark is a character of
the sentence, and one that is not closed would swallow lines. CoLA's have no header line, MRPC's
begins with a byte-order mark, and in a few rows of QQP's columns are missing. Those rows are left
out, and told.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jqlora.data.sources import Row, Sources, read_rows, text_of
from jqlora.errors import DataError
from jqlora.tasks.table import Task


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One text, or two that belong together, with the number of its class or its value."""

    texts: tuple[str, ...]
    label: int | float
    origin: str


def read_labelled(
    task: Task, source: Sources, labels: Sequence[str] = ()
) -> tuple[list[Labelled], list[str]]:
    """The records of a source, and the origins of rows that lack a column of their file's header.

    ``labels`` name the classes of a task that has no names of its own; without them its labels are
    numbers. Raises SourceError and DataError as :func:`jqlora.data.read_records` does; DataError
    for rows without a label, which a test set has none of.
    """

    def unquoted(path: Path) -> Iterator[Row]:
        return read_tsv(path, task.headless)

    names = task.labels or tuple(labels)
    records, broken = [], []
    for origin, row in read_rows(source, {".tsv": unquoted, ".txt": unquoted}):
        record = _record(task, names, origin, row)
        if record is None:
            broken.append(origin)
        else:
            records.append(record)
    if not records:
        raise DataError(f"{broken[0]}: no row has all the columns of the header")
    return records, broken


def read_tsv(path: Path, headless: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of a tab-separated file without quoting; ``headless`` are the columns of a file whose
    first line is no header. Columns that a line lacks are missing from its row."""
    lines = text_of(path).split("\n")
    first = lines[0].rstrip("\r").split("\t")
    known = not headless or headless[-1] in first
    columns = first if known else list(headless)
    for number, line in enumerate(lines[known:], start=1 + known):
        if line.strip():
            cells = line.rstrip("\r").split("\t")
            yield f"{path}:{number}", dict(zip(columns, cells, strict=False)) | {"": columns}


def _record(task: Task, names: Sequence[str], origin: str, row: Any) -> Labelled | None:
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: expected an object with named fields")
    header = row.get("", row)
    columns = next((c for c in task.texts if set(c) <= set(header)), None)
    column = next((name for name in task.label if name in header), None)
    if columns is None:
        accepted = " or ".join(", ".join(c) for c in task.texts)
        raise DataError(
            f"{origin}: {task.name} is read from the columns {accepted}; found "
            f"{', '.join(map(str, header))}"
        )
    if column is None:
        raise DataError(
            f"{origin}: no label in the column {' or '.join(task.label)}; test sets cannot be used"
        )
    texts = tuple(row[name] for name in columns if row.get(name) is not None)
    if len(texts) < len(columns) or row.get(column) is None:
        if "" in row:
            return None
        raise DataError(f"{origin}: {', '.join(columns)} and {column} must all be there")
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{origin}: {', '.join(columns)} must be text")
    number = _value if task.number else class_of
    return Labelled(texts, number(row[column], names, f"{origin}: {column}"), origin)


def _value(found: Any, names: Sequence[str], where: str) -> float:
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}={found!r} is no number") from error


def class_of(found: Any, names: Sequence[str], where: str) -> int:
    """The number of a class that is given by its name or by its number; DataError for neither."""
    if found in names:
        return list(names).index(found)
    try:
        number = int(found)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or (names and number >= len(names)):
        known = f"{', '.join(names)}, or 0 to {len(names) - 1}" if names else "a number from 0 up"
        raise DataError(f"{where}={found!r} is no label; expected {known}")
    return number
