"""Reading records from wherever they lie.

A source is a path, a glob pattern, a folder, ``package:NAME/path/inside`` for a file that an
installed package carries, ``datasets:NAME[:config[:split]]`` for the optional ``datasets`` library,
or a list of any of these. The file's suffix says how it is written; its keys say what it means
(:mod:`jqlora.data.records`). Reading stops at the first bad record and names its file and line.
"""

import csv
import glob
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jqlora.data.records import Record, parse_record
from jqlora.errors import DataError, SourceError

Row = tuple[str, Any]
"""``file:line`` and the decoded row."""
Reader = Callable[[Path], Iterator[Row]]
Sources = str | Path | Sequence[str | Path]


def read_records(source: Sources) -> list[Record]:
    """All records of a source, in file order.

    ======================  ============================================================
    ``.jsonl``, ``.json``   one object a line, or one array of objects
    ``.parquet``            one record a row
    ``.csv``, ``.tsv``      a header line with the field names, quoted as RFC 4180 says
    ``.txt``, ``.md``       plain text; a blank line ends a record
    ======================  ============================================================

    Raises:
      SourceError: nothing is there, or the suffix is unknown, or ``datasets`` cannot load it.
      DataError: a bad record (with file and line), or no record at all.
    """
    return [parse_record(row, origin) for origin, row in read_rows(source)]


def read_rows(source: Sources, readers: Mapping[str, Reader] | None = None) -> list[Row]:
    """All rows of a source as they are, each with its origin; ``readers`` by suffix go before those
    of :func:`read_records`.

    Raises SourceError and DataError as it does.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    chosen = {**READERS, **(readers or {})}
    rows = [row for one in sources for row in _rows_of_source(str(one), chosen)]
    if not rows:
        raise DataError(f"no records in {', '.join(map(str, sources)) or 'an empty list of files'}")
    return rows


def _rows_of_source(source: str, readers: Mapping[str, Reader]) -> Iterator[Row]:
    if source.startswith("datasets:"):
        yield from _read_datasets(source)
        return
    for path in files_of(source):
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise SourceError(f"{path}: unknown suffix; expected one of {', '.join(readers)}")
        yield from reader(path)


def files_of(source: str) -> list[Path]:
    """The files that a path, a pattern, a folder or ``package:NAME/FILE`` names; SourceError if
    none."""
    path = _inside_package(source) if source.startswith("package:") else Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS)
        missing = f"{source}: the folder holds no {', '.join(READERS)} file"
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        missing = f"{source}: no such file, and as a pattern it matches none"
    if not found:
        raise SourceError(missing)
    return found


def _inside_package(source: str) -> Path:
    package, _, inner = source.removeprefix("package:").partition("/")
    # find_spec of a top-level name finds the folder without running the package
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"{source}: no package {package!r} is installed")
    return Path(next(iter(spec.submodule_search_locations))) / inner


def text_of(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark; DataError with the line that is not."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error


def _read_json(path: Path) -> Iterator[Row]:
    text = text_of(path)
    is_array = text.lstrip().startswith("[")
    yield from (_json_array(path, text) if is_array else _json_lines(path, text))


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: expected one JSON object on the line: {error.msg} "
                    f"at column {error.colno}"
                ) from error


def _json_array(path: Path, text: str) -> Iterator[Row]:
    """Element by element, because only so is the line of each known."""
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip(at: int, characters: str) -> int:
        while at < len(text) and text[at] in characters:
            at += 1
        return at

    at = skip(at, " \t\r\n")
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: broken JSON array: {error.msg}") from error
        yield f"{path}:{line}", row
        after = skip(at, " \t\r\n")
        if text[after : after + 1] not in {",", "]"}:
            broken = line + text.count("\n", counted, after)
            raise DataError(f"{path}:{broken}: broken JSON array: expected ',' or ']'")
        at = skip(after + 1, " \t\r\n") if text[after] == "," else after


def _read_csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text_of(path)), delimiter=delimiter, strict=True)
    start = 2  # the line after the header
    try:
        for row in reader:
            origin = f"{path}:{start}"
            if None in row:
                raise DataError(f"{origin}: more values than the {len(row) - 1} header fields")
            yield origin, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{start}: broken CSV: {error}") from error


def _read_text(path: Path) -> Iterator[Row]:
    block: list[str] = []
    for number, line in enumerate([*text_of(path).split("\n"), ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            yield f"{path}:{number - len(block)}", {"text": "\n".join(block)}
            block = []


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


READERS: dict[str, Reader] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".md": _read_text,
}


def _read_datasets(source: str) -> Iterator[Row]:
    """``datasets:NAME``, ``datasets:NAME:config``, ``datasets:NAME:config:split`` (``NAME::split``
    without a config); the split is ``train`` unless named, and may be a slice, ``train[:1000]``."""
    name, config, split = [*source.removeprefix("datasets:").split(":", 2), "", ""][:3]
    try:
        import datasets
    except ImportError as error:
        raise SourceError(f"{source} needs the datasets library: pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{source}: datasets could not load {name!r} (written as "
            f"datasets:NAME, datasets:NAME:config or datasets:NAME:config:split): {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}:row {number}", row
