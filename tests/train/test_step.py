"""The step: compiled once, donated, frozen base untouched, accumulation that changes nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora import optim
from jqlora.errors import ConfigError
from jqlora.train import TrainState, make_train_step
from tests.train import toy


def start(tx, getkey):
    return toy.init_params(getkey()), TrainState.create(
        toy.init_adapters(getkey()), tx, jax.random.key(7)
    )


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), left, right)


def test_the_step_compiles_once_over_batches_and_updates(getkey):
    tx = optim.adamw(optim.cosine(0.01, steps=20, warmup=3), weight_decay=0.1)
    params, state = start(tx, getkey)
    step = make_train_step(toy.apply, tx)
    for seed in range(4):
        state, _ = step(state, params, toy.make_batch(seed))
    assert step._cache_size() == 1
    assert state.step == 4


def test_the_state_is_donated_and_the_callers_own_arrays_are_not(getkey):
    tx = optim.adamw(0.01)
    adapters, key = toy.init_adapters(getkey()), jax.random.key(7)
    state = TrainState.create(adapters, tx, key)
    after, _ = make_train_step(toy.apply, tx)(state, toy.init_params(getkey()), toy.make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.adapters, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, adapters, key)))


def test_every_donated_array_is_written_in_place(getkey):
    tx = optim.adamw(0.01, weight_decay=0.1)
    params, state = start(tx, getkey)
    program = make_train_step(toy.apply, tx).lower(state, params, toy.make_batch()).compile()
    aliased = re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", program.as_text().split("\n")[0])
    assert len(aliased) == len(jax.tree.leaves(state))
    memory = program.memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == held


def test_frozen_parameters_are_bit_identical_after_training(getkey):
    tx = optim.adamw(0.1)
    params, state = start(tx, getkey)
    before = jax.tree.map(np.array, params)
    step = make_train_step(toy.apply, tx)
    for seed in range(3):
        state, _ = step(state, params, toy.make_batch(seed))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_the_base_is_an_argument_and_not_a_constant_of_the_program(getkey):
    tx = optax.sgd(0.1)
    params, state = start(tx, getkey)
    step = make_train_step(toy.apply, tx)
    _, metrics = step(TrainState.create(state.adapters, tx, state.key), params, toy.make_batch())
    other = jax.tree.map(lambda p: 2 * p, params)
    _, changed = step(state, other, toy.make_batch())
    assert metrics["loss"] != changed["loss"]
    assert step._cache_size() == 1


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_full_batch(accumulate, getkey):
    # rows have different token counts, so a mean of means would differ visibly
    tx = optax.sgd(0.5)
    params, state = start(tx, getkey)
    batch = toy.make_batch()
    fresh = TrainState.create(state.adapters, tx, state.key)
    whole, expected = make_train_step(toy.apply, tx)(fresh, params, batch)
    parts, metrics = make_train_step(toy.apply, tx, accumulate=accumulate)(state, params, batch)
    assert_trees_close(metrics, expected, rtol=1e-5)
    assert_trees_close(parts.adapters, whole.adapters, rtol=1e-5, atol=1e-6)


def test_the_update_is_the_gradient_of_the_mean_loss(getkey):
    tx = optax.sgd(1.0)
    params, state = start(tx, getkey)
    batch = toy.make_batch()

    def mean_loss(adapters):
        from jqlora.train import causal_lm_loss

        total, count = causal_lm_loss(toy.apply, {"params": params, **adapters}, batch, None)
        return total / count

    loss, gradient = jax.value_and_grad(mean_loss)(state.adapters)
    expected = jax.tree.map(jnp.subtract, state.adapters, gradient)
    after, metrics = make_train_step(toy.apply, tx)(state, params, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    assert_trees_close(after.adapters, expected, rtol=1e-5, atol=1e-6)


def test_the_penalty_is_minimized_once_and_reported_apart(getkey):
    tx = optax.sgd(1.0)
    params, state = start(tx, getkey)

    class Bound:
        """As ``jq.bind`` returns it: a function that knows its plan's penalty."""

        __call__ = staticmethod(toy.apply)

        def penalty(self, adapters):
            return 0.5 * (adapters["lora"]["head"]["a"] ** 2).sum()

    a = np.array(state.adapters["lora"]["head"]["a"])
    plain, base = make_train_step(toy.apply, tx, accumulate=2)(
        TrainState.create(state.adapters, tx, state.key), params, toy.make_batch()
    )
    after, metrics = make_train_step(Bound(), tx, accumulate=2)(state, params, toy.make_batch())
    np.testing.assert_allclose(metrics["penalty"], 0.5 * (a**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], base["loss"], rtol=1e-6)
    moved = plain.adapters["lora"]["head"]["a"] - after.adapters["lora"]["head"]["a"]
    np.testing.assert_allclose(moved, a, rtol=1e-5, atol=1e-6)


def test_dropout_keys_come_from_the_state_and_change_with_the_step(getkey):
    tx = optax.sgd(0.0)  # nothing moves, so only the key can change the loss
    params, state = start(tx, getkey)
    adapters = jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape), state.adapters)
    step = make_train_step(functools.partial(toy.apply, dropout=0.5), tx)

    def losses():
        state, found = TrainState.create(adapters, tx, jax.random.key(1)), []
        for _ in range(3):
            state, metrics = step(state, params, toy.make_batch())
            found.append(float(metrics["loss"]))
        return found

    first = losses()
    assert len(set(first)) == 3
    assert losses() == first


def test_a_batch_without_counted_tokens_costs_nothing(getkey):
    tx = optax.sgd(1.0)
    params, state = start(tx, getkey)
    batch = toy.make_batch() | {"loss_mask": np.zeros((4, 9), bool)}
    before = jax.tree.map(np.array, state.adapters)
    after, metrics = make_train_step(toy.apply, tx)(state, params, batch)
    assert metrics["loss"] == metrics["tokens"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.adapters, before)


def test_an_uneven_accumulation_is_refused(getkey):
    tx = optax.sgd(1.0)
    params, state = start(tx, getkey)
    with pytest.raises(ConfigError, match=r"accumulate=3.*4"):
        make_train_step(toy.apply, tx, accumulate=3)(state, params, toy.make_batch())
