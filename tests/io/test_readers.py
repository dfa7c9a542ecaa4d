"""Weight files give back their tensors, and damage is one sentence that names file and tensor."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jqlora.errors import CheckpointError
from jqlora.io.readers import TensorInfo, open_directory
from jqlora.io.readers.safetensors import DTYPES, SafetensorsFile
from jqlora.io.shards import SafetensorsWriter
from tests.io.toy_files import write_tensors


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"F8_E4M3", "F8_E5M2", "BF16"}))
def test_every_type_is_read_as_the_formats_own_library_wrote_it(tmp_path, name):
    array = np.arange(12).reshape(3, 4).astype(DTYPES[name])
    save_file({"a": array, "scalar": np.array(1, array.dtype), "none": array[:0]}, tmp_path / "x")
    reader = SafetensorsFile(tmp_path / "x")
    assert set(reader.names()) == {"a", "scalar", "none"}
    assert reader.info("none").shape == (0, 4)
    for key, expected in load_file(tmp_path / "x").items():
        got = reader.read(key)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_what_is_written_is_what_the_formats_own_library_reads(tmp_path):
    tensors = {
        "odd": np.arange(3, dtype=np.uint8),
        "half": np.arange(5).astype(np.float16),
        "single": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    infos = {name: TensorInfo(a.shape, a.dtype) for name, a in tensors.items()}
    with SafetensorsWriter(tmp_path / "x", infos, texts=["text"]) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
        writer.write("text", np.frombuffer(b"of a length known late", np.uint8))
    got = load_file(tmp_path / "x")
    assert bytes(got.pop("text")) == b"of a length known late"
    assert set(got) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(got[name], array)
    assert SafetensorsFile(tmp_path / "x").metadata == {"format": "pt"}


def test_wide_types_come_first_so_that_every_tensor_is_aligned(tmp_path):
    tensors = {"a": np.zeros(3, np.uint8), "b": np.zeros(2, np.float32), "c": np.zeros(1, "f2")}
    write_tensors(tmp_path, tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, array in tensors.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


def test_a_tensor_other_than_announced_is_not_written(tmp_path):
    info = TensorInfo((2,), np.dtype(np.float32))
    with (
        pytest.raises(ValueError, match="is not the announced"),
        SafetensorsWriter(tmp_path / "x", {"a": info}) as writer,
    ):
        writer.write("a", np.zeros(3, np.float32))


def header_of(entries, body=b"", length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", "truncated or not a safetensors file"),
    "header longer than the file": (header_of({}, length=999), "claims 999 bytes"),
    "header of no end": (header_of({}, length=2**62), "truncated or not"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "damaged header"),
    "not UTF-8": (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "damaged header"),
    "a list": (header_of([1]), "not a JSON object"),
    "truncated": (header_of({"w": GOOD}, b"1234"), "truncated: tensor 'w' ends at byte"),
    "trailing": (header_of({"w": GOOD}, b"0" * 9), "1 bytes after its last tensor"),
    "unknown type": (header_of({"w": {**GOOD, "dtype": "F3"}}, b"0" * 8), "'w' has a damaged"),
    "no shape": (header_of({"w": {"dtype": "F32"}}, b"0" * 8), "'w' has a damaged"),
    "size against shape": (header_of({"w": {**GOOD, "shape": [3]}}, b"0" * 8), "'w' of shape"),
    "negative": (header_of({"w": {**GOOD, "shape": [-2]}}, b"0" * 8), "'w' of shape"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_safetensors_file_is_named_with_its_tensor(tmp_path, kind):
    content, message = DAMAGED[kind]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*" + message) as caught:
        open_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_while_it_is_read_is_noticed(tmp_path):
    write_tensors(tmp_path, {"w": np.zeros(1000, np.float32)})
    reader = open_directory(tmp_path)
    with open(tmp_path / "model.safetensors", "rb+") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match="truncated while reading tensor 'w'"):
        reader.read("w")


def sharded(folder):
    tensors = {f"t{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    write_tensors(folder, tensors, max_shard_bytes=130)
    return tensors, folder / "model.safetensors.index.json"


def test_shards_hold_at_most_their_limit_and_read_as_one(tmp_path):
    tensors, index = sharded(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert json.loads(index.read_text())["metadata"]["total_size"] == 5 * 64
    reader = open_directory(tmp_path)
    assert set(reader.names()) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(reader.read(name), array)
        assert reader.where(name).endswith("-of-00003.safetensors")


def change(weight_map, key, value):
    weight_map[key] = value


BAD_INDEX = {
    "shard that is absent": (lambda m: change(m, "t0", "gone.safetensors"), "'gone.safetensors'"),
    "path outside": (lambda m: change(m, "t0", "../x.safetensors"), r"'\.\./x\.safetensors'"),
    "tensor in no file": (lambda m: change(m, "more", m["t0"]), "'more' in .*does not hold it"),
    "tensor not listed": (lambda m: m.pop("t1"), "'t1', which .* does not list"),
    "tensor elsewhere": (lambda m: change(m, "t0", m["t4"]), "'t0', which .* puts elsewhere"),
}


@pytest.mark.parametrize("kind", BAD_INDEX)
def test_an_index_that_disagrees_with_its_shards_is_named(tmp_path, kind):
    _, index = sharded(tmp_path)
    spoil, message = BAD_INDEX[kind]
    content = json.loads(index.read_text())
    spoil(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        open_directory(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a weight index"):
        open_directory(tmp_path)


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has no weights"):
        open_directory(tmp_path)


def test_bfloat16_keeps_its_bits(tmp_path):
    array = np.arange(7).astype(ml_dtypes.bfloat16) / ml_dtypes.bfloat16(3)
    write_tensors(tmp_path, {"w": array})
    assert open_directory(tmp_path).read("w").tobytes() == array.tobytes()
