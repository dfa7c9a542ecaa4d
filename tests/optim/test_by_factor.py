"""LoRA+ and LoRA-FA: which factor moves how far, and what is kept for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora import optim
from jqlora.tree import flatten


@pytest.fixture(autouse=True)
def loose_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def params(getkey):
    normal = lambda *shape: jax.random.normal(getkey(), shape)  # noqa: E731
    return {
        "lora": {"q_proj": {"a": normal(2, 4, 3), "b": normal(2, 3, 5)}},
        "full": {"lm_head": {"kernel": normal(4, 5)}},
    }


def updates_of(tx, params, rounds=3):
    state = tx.init(params)
    for _ in range(rounds):
        updates, state = tx.update(params, state, params)
    return flatten(updates), state


@pytest.mark.parametrize("make", [optim.adamw, optim.lion, optim.sgd])
def test_lora_plus_is_another_learning_rate_for_the_second_factor(make, params):
    found, _ = updates_of(optim.lora_plus(make(1e-3, weight_decay=0.1), ratio=16), params)
    slow, _ = updates_of(make(1e-3, weight_decay=0.1), params)
    fast, _ = updates_of(make(16e-3, weight_decay=0.1), params)
    for path, update in found.items():
        expected = fast if path[-1] == "b" else slow
        np.testing.assert_allclose(update, expected[path], rtol=1e-6)


def test_lora_fa_freezes_the_first_factor_and_keeps_nothing_for_it(params):
    found, state = updates_of(optim.lora_fa(optim.adamw(1e-3, weight_decay=0.1)), params)
    assert not found["lora", "q_proj", "a"].any()
    assert all(update.all() for path, update in found.items() if path[-1] != "a")
    trained = sum(leaf.size for path, leaf in flatten(params).items() if path[-1] != "a")
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * trained


def test_lora_fa_trains_the_rest_as_if_the_first_factor_were_not_there(params):
    found, _ = updates_of(optim.lora_fa(optim.adamw(1e-3)), params)
    rest = {"lora": {"q_proj": {"b": params["lora"]["q_proj"]["b"]}}, "full": params["full"]}
    alone, _ = updates_of(optim.adamw(1e-3), rest)
    for path, update in alone.items():
        np.testing.assert_allclose(update, found[path], rtol=1e-6)


def test_decay_spares_the_values_that_adalora_prunes_to_zero():
    params = {"adalora": {"q_proj": {"p": jnp.ones((2, 3)), "lam": jnp.ones((1, 3))}}}
    tx = optim.adamw(0.1, weight_decay=0.5)
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    assert not updates["adalora"]["q_proj"]["lam"].any()
    assert updates["adalora"]["q_proj"]["p"].all()
