"""4-bit codes kept on the disk: the same bits, never out of date, never half, never in the way."""

import fcntl
import json
import os
import threading
import time

import jax
import numpy as np
import pytest

from jqlora import tree
from jqlora.cli import main
from jqlora.errors import CheckpointError
from jqlora.io import Cache, load
from jqlora.io.cache import RECORD, cache_folder
from jqlora.quant import FP4, INT8, NF4
from jqlora.run.keeping import keep, prune
from tests.io.toy_files import write_checkpoint

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = NF4(double_quant=True)
# one shape of matrices, so that one program quantizes all
SMALL = {"num_hidden_layers": 1, "intermediate_size": 64, "num_key_value_heads": 4}


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / "model", max_shard_bytes=60_000, **SMALL)
    return tmp_path / "model"


class Caching:
    """A cache in ``folder`` that remembers what it said."""

    def __init__(self, folder):
        self.said: list[str] = []
        self.cache = Cache(folder, self.said.append)

    def load(self, source, **options):
        """The leaves, and what was said meanwhile."""
        self.said.clear()
        _, params = load(source, **{"quantize": SPEC, **options}, cache=self.cache)
        return jax.tree.map(np.asarray, tree.flatten(params)), " ".join(self.said)

    @property
    def copies(self):
        return self.cache.copies()


@pytest.fixture
def caching(tmp_path):
    return Caching(tmp_path / "kept")


def assert_same(ours, others):
    assert ours.keys() == others.keys()
    for path, leaf in ours.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, others[path])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize": FP4(block=128), "dtype": "bfloat16"},
        {"task": "sequence-classification", "num_labels": 3, "skip": ("classifier",), "seed": 5},
    ],
    ids=["nf4", "fp4 in bf16", "a fresh head"],
)
def test_a_kept_copy_gives_the_same_bits(tmp_path, caching, options):
    if "task" in options:
        bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "type_vocab_size": 2}
        bert["tie_word_embeddings"] = True
        write_checkpoint(tmp_path / "model", **bert, **SMALL)
    else:
        write_checkpoint(tmp_path / "model", max_shard_bytes=60_000, **SMALL)
    _, plain = load(tmp_path / "model", **{"quantize": SPEC, **options})
    first, said = caching.load(tmp_path / "model", **options)
    assert "keeping the 4-bit codes" in said
    assert "jqlora cache --clear" in said
    again, said = caching.load(tmp_path / "model", **options)
    assert "reading the 4-bit codes" in said
    assert "keeping" not in said
    for leaves in (first, again):
        assert_same(leaves, jax.tree.map(np.asarray, tree.flatten(plain)))


def test_a_copy_is_a_checkpoint_in_bitsandbytes_layout(checkpoint, caching):
    leaves, _ = caching.load(checkpoint)
    (copy,) = caching.copies
    _, params = load(copy)
    assert_same(jax.tree.map(np.asarray, tree.flatten(params)), leaves)


def test_whatever_decides_the_bytes_makes_another_copy(checkpoint, caching):
    caching.load(checkpoint)
    for options in ({"quantize": NF4()}, {"skip": ("lm_head", "q_proj")}):
        _, said = caching.load(checkpoint, **options)
        assert "keeping" in said, options
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    _, said = caching.load(checkpoint)
    assert "keeping" in said
    assert len(caching.copies) == 4
    caching.load(checkpoint, scan=False)  # how layers lie in memory does not
    assert len(caching.copies) == 4


def cut(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flip(copy):
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-2000] ^= 1
    (copy / "model.safetensors").write_bytes(data)


DAMAGES = {
    "cut short": cut,
    "one bit": flip,
    "half a record": lambda copy: (copy / RECORD).write_text('{"checksums'),
    "no config": lambda copy: (copy / "config.json").unlink(),
}


def test_a_damaged_copy_is_told_in_one_line_and_made_again(checkpoint, caching):
    whole, _ = caching.load(checkpoint)
    (copy,) = caching.copies
    for what, damage in DAMAGES.items():
        damage(copy)
        again, _ = caching.load(checkpoint)
        assert sum("is damaged" in line for line in caching.said) == 1, what
        assert sum("keeping" in line for line in caching.said) == 1, what
        assert_same(again, whole)


def test_a_second_process_waits_and_reads_what_the_first_made(checkpoint, caching):
    whole, _ = caching.load(checkpoint)
    (copy,) = caching.copies
    made = copy.with_name("made")
    os.rename(copy, made)
    lock = os.open(f"{copy}.lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # another process is at it ...
    other = Caching(caching.cache.folder)
    found = []
    thread = threading.Thread(target=lambda: found.append(other.load(checkpoint)))
    thread.start()
    while not other.said:
        time.sleep(0.01)
    os.rename(made, copy)  # ... and done
    os.close(lock)
    thread.join(60)
    leaves, said = found[0]
    assert "waiting" in said
    assert "keeping" not in said
    assert_same(leaves, whole)


def test_what_a_killed_process_left_is_cleared_away(checkpoint, caching):
    caching.load(checkpoint)
    (copy,) = caching.copies
    left = copy.with_name(f".{copy.name}.abc123")
    os.rename(copy, left)
    caching.load(checkpoint)
    assert not left.exists()
    assert len(caching.copies) == 1


def test_where_nothing_can_be_written_the_checkpoint_is_loaded(tmp_path, checkpoint):
    (tmp_path / "file").write_text("in the way")
    caching = Caching(tmp_path / "file")
    leaves, said = caching.load(checkpoint)
    assert "no copy is kept" in said
    _, params = load(checkpoint, quantize=SPEC)
    assert_same(leaves, jax.tree.map(np.asarray, tree.flatten(params)))


def test_a_damaged_checkpoint_is_blamed_itself(checkpoint, caching):
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=shard.name):
        caching.load(checkpoint)
    assert caching.copies == []


def test_what_files_have_no_place_for_is_not_kept(checkpoint, caching):
    caching.load(checkpoint, quantize=INT8())
    caching.load(checkpoint, quantize=None)
    assert caching.said == []
    assert caching.copies == []


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("JQLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jqlora"
    monkeypatch.setenv("JQLORA_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"


def test_the_command_lists_and_clears_nothing_but_what_is_kept(checkpoint, caching, capsys):
    caching.load(checkpoint)
    folder, (copy,) = caching.cache.folder, caching.copies
    record = json.loads((copy / RECORD).read_text())
    assert record["origin"]["quantize"] == repr(SPEC)
    for machine in ("0" * 16, "1" * 16):
        (folder / "programs" / machine).mkdir(parents=True)
    (folder / "quantized" / "mine.txt").write_text("not the cache's")
    (folder / "quantized" / f".{copy.name}.left").mkdir()
    assert main(["cache", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [str(checkpoint) in line and str(copy) in line for line in lines] == [True, False, False]
    assert main(["cache", str(folder), "--clear"]) == 0
    assert sorted(p.name for p in folder.rglob("*")) == ["mine.txt", "programs", "quantized"]


def test_off_keeps_nothing_and_auto_follows_the_environment(monkeypatch, tmp_path):
    said = []
    assert keep("off", said.append) is None
    assert keep("auto", said.append) is None, "conftest turns it off"
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert keep(str(tmp_path), said.append) == Cache(tmp_path, said.append)
    monkeypatch.setenv("JQLORA_CACHE", str(tmp_path / "b"))
    assert keep("auto", said.append) == Cache(tmp_path / "b", said.append)


def test_of_many_programs_those_not_used_for_longest_go(tmp_path):
    for age, name in enumerate(("a/new", "b/older", "a/oldest")):
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        program.write_bytes(b"." * 100)
        os.utime(program, (1e9 - age, 1e9 + age))
    prune(tmp_path, 300)
    assert len(list(tmp_path.glob("*/*"))) == 3
    prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["new", "older"]
