"""Training in bfloat16: unbiased where fp32 would move, exact where nothing is to be rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora import optim
from jqlora.optim.rounding import apply_updates, round_stochastically
from jqlora.train import TrainState, make_train_step
from tests.train import toy

KEY = jax.random.key(3)


def test_what_bfloat16_holds_stays_as_it_is():
    exact = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16).astype(np.float32)
    rounded = round_stochastically(jnp.asarray(exact), KEY)
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), exact)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_it_rounds_to_a_neighbour_and_on_average_not_at_all(share, sign):
    low, high = (1.0 + i / 128 for i in (0, 1))
    x = np.float32(low + share * (high - low))
    found = sign * np.asarray(round_stochastically(jnp.full(40_000, sign * x), KEY), np.float32)
    assert set(found.tolist()) == {low, high}
    error = (found.mean() - x) / (high - low)
    assert abs(error) < 5 * np.sqrt(share * (1 - share) / found.size)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3.4e38])
def test_no_number_comes_out_of_what_is_none(value):
    rounded = np.asarray(round_stochastically(jnp.full(64, value, jnp.float32), KEY), np.float32)
    if np.isfinite(value):  # the last number of bfloat16, or beyond it
        assert (rounded >= 3.3e38).all()
    else:
        np.testing.assert_array_equal(rounded, np.full(64, np.float32(value)))


def test_steps_too_small_for_the_nearest_number_add_up():
    start = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.float32)}
    step = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0**-12, leaf.dtype), start)
    nearest, moved = start, start
    for i in range(64):
        nearest = optax.apply_updates(nearest, step)
        moved = jax.jit(apply_updates)(moved, step, jax.random.key(i))
    assert (nearest["a"] == 1).all()
    np.testing.assert_array_equal(moved["b"], nearest["b"])
    mean = np.asarray(moved["a"], np.float64).mean()
    assert abs(mean - (1 + 64 * 2.0**-12)) < 5 * (2**-7 / 2) * np.sqrt(64 / 4096)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_moments_of_bfloat16_decay_as_those_of_fp32(bits):
    # at 0.999 a moment in bfloat16 that is rounded to the nearest stays for ever
    tx = optim.adamw(1e-3, bits=bits, max_grad_norm=None)
    params = {"lora": {"a": jnp.ones((32, 128), jnp.bfloat16)}}

    @jax.jit
    def after_silence(steps):
        with jax.numpy_dtype_promotion("standard"):
            _, state = tx.update(params, tx.init(params), params)
            silent = jax.tree.map(jnp.zeros_like, params)
            return jax.lax.fori_loop(
                0, steps, lambda _, state: tx.update(silent, state, params)[1], state
            )

    before, after = after_silence(0), after_silence(300)

    def second_moment(state):
        (path, leaf), *_ = [
            (path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                state, is_leaf=lambda node: hasattr(node, "decode")
            )
            if ".nu" in jax.tree_util.keystr(path)
        ]
        leaf = leaf.decode() if hasattr(leaf, "decode") else leaf
        assert leaf.dtype == (jnp.bfloat16 if bits == 16 else jnp.float32), path
        return np.asarray(leaf, np.float64).mean()

    decay = second_moment(after) / second_moment(before)
    assert abs(decay - 0.999**300) < 0.01


def test_micro_batches_add_up_in_fp32():
    def summed(apply, variables, batch, key):
        products = variables["lora"]["a"] * batch["x"]
        return products.sum(dtype=jnp.float32), jnp.float32(1)

    adapters = {"lora": {"a": jnp.ones((), jnp.bfloat16)}}
    batch = {"x": np.asarray([256, 1, 1, 1], np.float32).astype(jnp.bfloat16)}
    tx = optax.identity()
    step = make_train_step(toy.apply, tx, loss=summed, accumulate=4)
    _, metrics = step(TrainState.create(adapters, tx, KEY), {}, batch)
    assert metrics["grad_norm"] == 259 / 4  # 256 + 1 is 256 in bfloat16
