"""Checkpoints: bit-identical, atomic, few, and never trusted when damaged."""

import contextlib
import gc
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora import optim
from jqlora.errors import RunError, SaveError
from jqlora.optim.residence import decided, residence
from jqlora.train import TrainState
from jqlora.train.checkpoint import Checkpoints
from tests.train import toy

pytestmark = pytest.mark.usefixtures("compile_quickly")

TX = optim.adamw(optim.cosine(0.01, steps=10, warmup=2), weight_decay=0.1)


def state_at(step, seed=0, adapters=None):
    adapters = adapters or toy.init_adapters(jax.random.key(seed))
    state = TrainState.create(adapters, TX, jax.random.key(seed))
    return state.replace(step=jnp.asarray(step, jnp.int32))


def assert_identical(left, right):
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, left, right)


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    return Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)


def test_a_state_returns_bit_for_bit_with_its_key_and_loader(checkpoints):
    state = state_at(7, seed=3)
    checkpoints.save(state, {"grain": {"next": 8}})
    restored = checkpoints.restore_latest(state_at(0))
    assert restored is not None
    assert_identical(restored[0], state)
    assert restored[1] == {"grain": {"next": 8}}


OFFLOADS = ("none", "auto", "all")


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("saved", OFFLOADS)
def test_a_state_is_restored_into_the_memory_that_is_asked_for(saved, bits, checkpoints):
    random = np.random.default_rng(0)
    adapters = {"lora": {"head": {"a": jnp.zeros((400, 256)), "b": jnp.zeros((4, 11))}}}

    def create(offload):
        tx = optim.adamw(1e-3, bits=bits, offload=offload)
        return TrainState.create(adapters, tx, jax.random.key(0))

    def filled(leaf):
        values = random.integers(0, 256, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    state = create(saved)
    state = state.replace(opt_state=jax.tree.map(filled, decided(state.opt_state)))
    checkpoints.save(state, {})
    for asked in OFFLOADS:
        like = create(asked)
        restored, _ = checkpoints.restore_latest(like)
        assert jax.tree.structure(restored) == jax.tree.structure(like)
        assert_identical(jax.tree.leaves(restored), jax.tree.leaves(state))
        assert residence(restored.opt_state) == residence(like.opt_state)
        assert (residence(restored.opt_state).host == 0) == (asked == "none")


def test_nothing_saved_is_nothing_restored(checkpoints):
    assert checkpoints.restore_latest(state_at(0)) is None


def test_only_the_newest_are_kept(checkpoints):
    for step in (2, 4, 6):
        checkpoints.save(state_at(step), {})
    assert checkpoints.steps() == [4, 6]


def damage_by_truncation(path):
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


def damage_by_a_flipped_bit(path):
    data_file = max((path / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data_file.read_bytes())
    content[len(content) // 2] ^= 1
    data_file.write_bytes(content)


DAMAGES = {
    "truncated": damage_by_truncation,
    "flipped bit": damage_by_a_flipped_bit,
    "file missing": lambda path: (path / "loader.json").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "empty manifest": lambda path: (path / "manifest.json").write_text(""),
    "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over_with_a_message(damage, checkpoints, said):
    checkpoints.save(state_at(2, seed=2), {"at": 2})
    checkpoints.save(state_at(4, seed=4), {"at": 4})
    damage(checkpoints.directory / "000004")
    restored = checkpoints.restore_latest(state_at(0))
    assert restored is not None
    assert_identical(restored[0], state_at(2, seed=2))
    assert restored[1] == {"at": 2}
    assert len(said) == 1
    assert "000004" in said[0]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(checkpoints):
    checkpoints.save(state_at(2), {"at": 2})
    damage_by_truncation(checkpoints.directory / "000002")
    checkpoints.save(state_at(2), {"at": 2})
    assert checkpoints.restore_latest(state_at(0)) is not None


def test_an_interrupted_save_is_invisible_and_can_be_cleaned(checkpoints):
    checkpoints.save(state_at(2), {})
    half = checkpoints.directory / ".000004.abc"
    half.mkdir()
    assert checkpoints.steps() == [2]
    checkpoints.clean()
    assert [path.name for path in checkpoints.directory.iterdir()] == ["000002"]


def test_a_checkpoint_of_another_configuration_is_refused(checkpoints):
    checkpoints.save(state_at(2), {})
    other = state_at(0, adapters={"lora": {"head": {"a": jnp.zeros((8, 5))}}})
    with pytest.raises(RunError, match="another run"):
        checkpoints.restore_latest(other)


def test_a_place_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match="cannot write"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(state_at(1), {})


@contextlib.contextmanager
def no_file_beyond(size):
    """What a full disk does to a writer: the system refuses in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [0, 4096])
def test_a_disk_that_fills_up_is_one_error_and_leaves_earlier_checkpoints(size, checkpoints):
    noise = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    large = {"lora": {"kernel": jnp.asarray(noise)}}  # 256 KiB that compress to no less
    first = state_at(2, adapters=large)
    checkpoints.save(first, {"next": 3})
    with no_file_beyond(size), pytest.raises(SaveError, match="cannot write"):
        checkpoints.save(state_at(4, adapters=large), {"next": 5})
    assert checkpoints.steps() == [2]
    state, position = checkpoints.restore_latest(state_at(0, adapters=large))
    assert_identical(state, first)
    assert position == {"next": 3}
    checkpoints.save(state_at(4, adapters=large), {"next": 5})
    assert checkpoints.steps() == [2, 4]
    gc.collect()  # orbax leaves writes behind that complain of their closed loop: here, not later
