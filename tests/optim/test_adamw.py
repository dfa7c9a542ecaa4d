"""AdamW: one optimizer with torch's, and a decay that knows what to spare."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora import optim


@pytest.fixture(autouse=True)
def loose_promotion():
    """optax mixes integer counts and floats; ``make_train_step`` allows it the same."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(draw):
    return {
        "lora": {"layers": {"q_proj": {"a": draw((2, 4, 3))}}},
        "full": {
            "layers": {"norm": {"scale": jnp.ones((2, 4))}, "q_proj": {"bias": jnp.ones((2, 4))}},
            "lm_head": {"kernel": draw((4, 5))},
        },
    }


def test_decay_spares_biases_and_norms_even_when_they_are_stacked(draw):
    assert optim.decayed(tree(draw)) == {
        "lora": {"layers": {"q_proj": {"a": True}}},
        "full": {
            "layers": {"norm": {"scale": False}, "q_proj": {"bias": False}},
            "lm_head": {"kernel": True},
        },
    }


def test_without_gradient_only_decayed_leaves_move(draw):
    params = tree(draw)
    tx = optim.adamw(0.1, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    expected = jax.tree.map(lambda p, d: p * 0.95 if d else p, params, optim.decayed(params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), after, expected)


def test_clipping_bounds_the_norm_that_adam_sees(draw):
    params = tree(draw)
    large = jax.tree.map(lambda p: 100.0 * jnp.ones_like(p), params)
    clipped = optim.adamw(1.0, max_grad_norm=1.0)
    small = jax.tree.map(lambda g: g / optax.tree.norm(large), large)
    free = optim.adamw(1.0, max_grad_norm=None)
    a, _ = clipped.update(large, clipped.init(params), params)
    b, _ = free.update(small, free.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


@pytest.mark.parity
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_ten_updates_equal_torch_adamw(weight_decay, max_grad_norm):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    gradients = rng.normal(size=(10, 4, 3)).astype(np.float32)

    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=weight_decay)
    ours = {"kernel": jnp.asarray(start)}
    tx = optim.adamw(
        0.01, betas=(0.9, 0.95), weight_decay=weight_decay, max_grad_norm=max_grad_norm
    )
    state = tx.init(ours)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([theirs], max_grad_norm)
        optimizer.step()
        updates, state = tx.update({"kernel": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), rtol=2e-5, atol=1e-6)
