"""``offload="auto"``: what stays on the device is decided by the memory of the compiled step."""

import jax
import numpy as np
import pytest

from jqlora import optim
from jqlora.optim.offload import DEVICE
from jqlora.optim.residence import decided, is_undecided, residence
from jqlora.train import TrainState, make_train_step
from jqlora.train.checkpoint import Checkpoints
from jqlora.train.placement import compiled_bytes
from tests.train import toy
from tests.train.compilations import compilations

WIDTH, RANK, LARGE = 512, 256, 4 * 512 * 256
TX = optim.adamw(optim.cosine(0.01, steps=20, warmup=2), offload="auto")


def init():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embed": jax.random.normal(keys[0], (toy.VOCABULARY, WIDTH)),
        "head": jax.random.normal(keys[1], (WIDTH, toy.VOCABULARY)),
    }
    a = jax.random.normal(keys[2], (WIDTH, RANK)) / 16
    adapters = {"lora": {"head": {"a": a, "b": jax.numpy.zeros((RANK, toy.VOCABULARY))}}}
    return params, TrainState.create(adapters, TX, keys[3])


def needed():
    """What the step needs with all of its state on the device."""
    params, state = init()
    moments = jax.tree.map(lambda leaf: jax.device_put(leaf, DEVICE), decided(state.opt_state))
    state = TrainState(state.step, state.adapters, moments, state.key)
    step = make_train_step(toy.apply, TX)
    return compiled_bytes(step.lower(state, params, toy.make_batch()).compile())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four steps with room for both moments, for one, for none, and on a device that is silent."""
    found = {}
    whole = needed()
    for name, room in {"all": whole, "one": whole - 1, "none": 1000, "silent": None}.items():
        said, (params, state) = [], init()
        before = residence(state.opt_state)
        step = make_train_step(toy.apply, TX, device_bytes=room, say=said.append)
        places = [before]
        with compilations() as compiled:
            for seed in range(4):
                state, _ = step(state, params, toy.make_batch(seed))
                places.append(residence(state.opt_state))
                if seed == 1:
                    checkpoints = Checkpoints(tmp_path_factory.mktemp(name))
                    checkpoints.save(state, {})
            fresh = init()[1]
            restored, _ = checkpoints.restore_latest(fresh)
            for seed in (2, 3):
                restored, _ = step(restored, params, toy.make_batch(seed))
        found[name] = state, places, said, len(compiled), restored
    return found


AWAY = {"all": 0, "one": 1, "none": 2, "silent": 0}


@pytest.mark.parametrize("name", AWAY)
def test_no_more_is_moved_than_the_room_asks_for(runs, name):
    state, places, _, _, _ = runs[name]
    assert places[0].host == 2 * LARGE
    assert {place.host for place in places[1:]} == {AWAY[name] * LARGE}
    assert not is_undecided(state.opt_state)


def test_it_says_what_was_decided(runs):
    assert all("stays on the device" in runs[name][2][0] for name in ("all", "silent"))
    assert "512.0 KiB in host memory" in runs["one"][2][0]
    assert "does not fit" in runs["none"][2][0]
    assert not any("does not fit" in runs[name][2][0] for name in ("all", "one"))


@pytest.mark.parametrize("name", AWAY)
def test_the_numbers_do_not_depend_on_it_nor_on_a_resume(runs, name):
    state, _, _, _, restored = runs[name]
    for other in (runs["all"][0], restored):
        jax.tree.map(
            np.testing.assert_array_equal,
            (state.adapters, state.opt_state),
            (other.adapters, other.opt_state),
        )


def test_only_what_does_not_fit_is_compiled_twice(runs):
    """What was compiled to decide is what runs, in the resumed part as well."""
    counts = {name: run[3] for name, run in runs.items()}
    assert counts == {"all": 1, "one": 2, "none": 1, "silent": 1}
