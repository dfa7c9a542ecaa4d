"""Every way of writing records gives the same records, and every flaw is found at its line."""

import csv
import json
import sys

import pytest

from jqlora.data import read_records
from jqlora.errors import DataError, SourceError

ROWS = [
    {"prompt": "one, two", "completion": "three"},
    {"prompt": 'with "quotes"\nand a line break', "completion": "Größe — 東京"},
    {"prompt": "last", "completion": "end"},
]


def write_jsonl(path):
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8-sig")


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, ["prompt", "completion"], delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "lines"),
    [
        ("rows.jsonl", write_jsonl, ["1", "3", "5"]),
        ("rows.json", write_jsonl, ["1", "3", "5"]),
        ("rows.json", write_json, ["2", "6", "10"]),
        ("rows.csv", write_csv, ["2", "3", "5"]),
        ("rows.tsv", write_csv, ["2", "3", "5"]),
        ("rows.parquet", write_parquet, ["row 1", "row 2", "row 3"]),
    ],
)
def test_every_file_format_gives_the_same_records_and_their_lines(tmp_path, name, write, lines):
    path = tmp_path / name
    write(path)
    records = read_records(path)
    assert [{"prompt": r.prompt, "completion": r.completion} for r in records] == ROWS
    assert [r.origin for r in records] == [f"{path}:{line}" for line in lines]


def test_a_blank_line_ends_a_record_of_a_text_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\nfirst\nparagraph\n\n  \nsecond\n")
    records = read_records(path)
    assert [(r.text, r.origin) for r in records] == [
        ("first\nparagraph", f"{path}:2"),
        ("second", f"{path}:6"),
    ]


def test_lists_patterns_and_folders_are_read_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (tmp_path / "notes.log").write_text("no record")
    texts = lambda source: [r.text for r in read_records(source)]  # noqa: E731
    assert texts(tmp_path) == texts(f"{tmp_path}/*.jsonl") == ["a", "b", "c"]
    assert texts([f"{tmp_path}/c.jsonl", f"{tmp_path}/[ab].jsonl"]) == ["c", "a", "b"]


def test_a_file_inside_an_installed_package_is_found_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was run')")
    (package / "rows.jsonl").write_text('{"text": "carried"}')
    monkeypatch.syspath_prepend(tmp_path)
    assert read_records("package:carrier/rows.jsonl")[0].text == "carried"
    with pytest.raises(SourceError, match="no package 'absent'"):
        read_records("package:absent/rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a.jsonl:3: expected one JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x"} 7\n', r"a.jsonl:2: expected one JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a.jsonl:2: no known format"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a.jsonl:2: not UTF-8"),
        ("a.json", b'[\n{"text": "x"},\n{"text": 3}]', r"a.json:3: text must be text"),
        ("a.json", b'[\n{"text": "x"}\n\n{"text": 3}]', r"a.json:4: broken JSON array: expected"),
        ("a.json", b'[\n{"text": "x"},\n{"text" 3}]', r"a.json:3: broken JSON array"),
        ("a.json", b'[\n{"text": "x"},\n', r"a.json:3: broken JSON array"),
        ("a.csv", b"prompt,completion\na,b\nc,d,e\n", r"a.csv:3: more values than the 2 header"),
        ("a.csv", b'prompt,completion\na,b\nc,"d\n', r"a.csv:3: broken CSV"),
        ("a.csv", b"prompt,reply\na,b\n", r"a.csv:2: no known format"),
        ("a.csv", b"prompt,completion\na,b\nc\n", r"a.csv:3: no known format"),
        ("a.parquet", b"PAR1 but not really", r"a.parquet: not a readable Parquet file"),
    ],
)
def test_a_flaw_is_reported_with_its_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n"), ("a.txt", "")],
)
def test_an_empty_data_set_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"no records in .*{name}"):
        read_records(tmp_path / name)


def test_an_empty_list_of_files_is_an_error():
    with pytest.raises(DataError, match="no records in an empty list of files"):
        read_records([])


def test_missing_files_and_unknown_suffixes_are_errors(tmp_path):
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(SourceError, match=r"a\.xls: unknown suffix; expected one of \.jsonl"):
        read_records(tmp_path / "a.xls")
    with pytest.raises(SourceError, match="no such file"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(SourceError, match="the folder holds no"):
        read_records(tmp_path)


@pytest.fixture
def local_data_set(tmp_path, monkeypatch):
    """A folder that the datasets library takes for a data set with two splits."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [json.dumps({"text": f"{split} {i}"}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.mark.parametrize(
    ("suffix", "texts"),
    [
        ("", ["train 0", "train 1", "train 2"]),
        (":default", ["train 0", "train 1", "train 2"]),
        (":default:test", ["test 0", "test 1"]),
        ("::test", ["test 0", "test 1"]),
        ("::train[1:]", ["train 1", "train 2"]),
    ],
)
def test_the_datasets_library_is_read_by_name_config_and_split(local_data_set, suffix, texts):
    source = f"datasets:{local_data_set}{suffix}"
    records = read_records(source)
    assert [r.text for r in records] == texts
    assert records[0].origin == f"{source}:row 1"


def test_what_datasets_cannot_load_is_one_error(local_data_set):
    with pytest.raises(SourceError, match="written as datasets:NAME, datasets:NAME:config"):
        read_records(f"datasets:{local_data_set}:default:absent")
    with pytest.raises(SourceError, match="could not load"):
        read_records(f"datasets:{local_data_set}/absent")


def test_a_missing_datasets_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match="pip install datasets"):
        read_records("datasets:some/set")
