"""A step compiled by a thread before it is called: the same numbers, and nothing compiled again."""

import jax
import numpy as np
import pytest

from jqlora import optim
from jqlora.errors import ConfigError
from jqlora.train import TrainState, make_train_step
from jqlora.train.ahead import compiled_ahead
from tests.train import toy
from tests.train.compilations import compilations

pytestmark = pytest.mark.usefixtures("compile_quickly")
TX = optim.adamw(0.01)


def arguments():
    params, adapters = (
        make(jax.random.key(i)) for i, make in enumerate((toy.init_params, toy.init_adapters))
    )
    return TrainState.create(adapters, TX, jax.random.key(2)), params


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def steps(step, *batches):
    """The state and the metrics of each step."""
    state, params = arguments()
    metrics = []
    for batch in batches:
        state, found = step(state, params, batch)
        metrics.append(found)
    return jax.tree.map(np.asarray, (state.adapters, state.opt_state, metrics))


@pytest.fixture(scope="module")
def on_call(compile_quickly):
    """Numbers of a step that was compiled when it was called."""
    return steps(make_train_step(toy.apply, TX), toy.make_batch(0), toy.make_batch(1))


def test_the_loop_compiles_nothing_more_and_gets_the_same_bits(on_call):
    with compilations() as compiled:
        step = make_train_step(toy.apply, TX)
        ahead = compiled_ahead(step, *shapes(arguments()), toy.make_batch())
        found = steps(ahead, toy.make_batch(0), toy.make_batch(1))
    assert not compiled  # in this thread, which alone is listened to
    jax.tree.map(np.testing.assert_array_equal, found, on_call)


def test_a_wrong_guess_costs_a_compilation_and_changes_no_number(on_call):
    """Other shapes of batches, and arrays that turn out to be bound to another device."""
    state, params = shapes(arguments())
    second = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    elsewhere = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=second), params
    )
    for guess in ((state, params, toy.make_batch(length=7)), (state, elsewhere, toy.make_batch())):
        with compilations() as compiled:
            ahead = compiled_ahead(make_train_step(toy.apply, TX), *guess)
            found = steps(ahead, toy.make_batch(0), toy.make_batch(1))
        assert len(compiled) == 1
        jax.tree.map(np.testing.assert_array_equal, found, on_call)


def test_what_tracing_raises_comes_at_the_first_call():
    state, params = arguments()
    step = make_train_step(toy.apply, TX, accumulate=3)
    ahead = compiled_ahead(step, *shapes((state, params)), toy.make_batch())
    with pytest.raises(ConfigError, match="accumulate") as own:
        step(state, params, toy.make_batch())
    with pytest.raises(ConfigError) as met:
        ahead(state, params, toy.make_batch())
    assert str(met.value) == str(own.value)
