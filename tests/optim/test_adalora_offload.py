"""AdaLoRA's two means of every entry in host memory: the same run, and a checkpoint for either."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora import optim
from jqlora.attach import bind, init, plan
from jqlora.errors import ConfigError
from jqlora.methods import AdaLoRA
from jqlora.optim.adalora import allocation_of, scores_by_module
from jqlora.optim.offload import SMALLEST, on_host
from jqlora.optim.residence import decided, residence
from jqlora.train import TrainState, make_train_step
from jqlora.train.checkpoint import Checkpoints

WIDTH, RANK, STEPS, SAVED_AT = 512, 200, 10, 5
LARGE = WIDTH * RANK
SCHEDULE = {"total_steps": STEPS, "initial_steps": 2, "final_steps": 3, "interval": 2}


class Two(nn.Module):
    """Two matrices whose triplets are large enough to be moved."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="down")(jnp.tanh(nn.Dense(WIDTH, name="up")(x)))


def loss(apply, variables, batch, key):
    error = apply(variables, batch["x"]) - batch["y"]
    return (error**2).sum(), jnp.asarray(float(error.size))


def batch_of(number):
    x, y = np.random.default_rng(number).normal(size=(2, 8, WIDTH)).astype(np.float32)
    return {"x": x, "y": y}


class Training:
    """A short run with the means, and AdamW's moments if asked, where ``offload`` says."""

    def __init__(self, offload, *, moments="none"):
        model = Two()
        self.params = model.init(jax.random.key(0), jnp.zeros((1, WIDTH)))["params"]
        spec = AdaLoRA(init_rank=RANK, target_rank=RANK // 2, alpha=RANK, targets=["up", "down"])
        self.plan = plan(model, self.params, spec, jnp.zeros((1, WIDTH)))
        inner = optim.adamw(1e-3, offload=moments, max_grad_norm=None)
        self.tx = optim.adalora(inner, self.plan, **SCHEDULE, offload=offload)
        self.said = []
        self.step = make_train_step(
            bind(model, self.plan), self.tx, loss=loss, say=self.said.append
        )

    def start(self):
        return TrainState.create(init(jax.random.key(1), self.plan), self.tx, jax.random.key(2))

    def run(self, state, checkpoints=None):
        while int(state.step) < STEPS:
            state, _ = self.step(state, self.params, batch_of(int(state.step)))
            if checkpoints is not None and int(state.step) == SAVED_AT:
                checkpoints.save(state, {})
        return state


@pytest.fixture(scope="module")
def plain():
    training = Training("none")
    return training.run(training.start())


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    training = Training("all")
    checkpoints = Checkpoints(tmp_path_factory.mktemp("away"))
    return training, training.run(training.start(), checkpoints), checkpoints


def assert_identical(left, right):
    numbers = [(s.adapters, decided(s.opt_state)) for s in (left, right)]
    jax.tree.map(np.testing.assert_array_equal, *numbers)


def test_the_means_live_on_the_host_and_change_no_bit(plain, away):
    training, state, _ = away
    assert training.step._cache_size() == 1
    allocation = allocation_of(state.opt_state)
    for leaf in jax.tree.leaves((allocation.importance, allocation.uncertainty)):
        assert on_host(leaf) == (leaf.size >= SMALLEST)
    assert residence(state.opt_state).host == 2 * 4 * 4 * LARGE
    assert_identical(state, plain)
    assert allocation.budget == RANK
    for path, scores in scores_by_module(allocation).items():
        np.testing.assert_array_equal(
            scores, scores_by_module(allocation_of(plain.opt_state))[path]
        )


def test_a_run_goes_on_with_its_state_in_another_memory(plain, away):
    """Saved with the means on the host; resumed as a device decides that does not tell its size."""
    _, _, checkpoints = away
    training = Training("auto")
    restored, _ = checkpoints.restore_latest(training.start())
    assert int(restored.step) == SAVED_AT
    state = training.run(restored)
    assert "stays on the device" in training.said[0]
    assert residence(state.opt_state).host == 0
    assert_identical(state, plain)


def test_moments_and_means_go_together():
    training = Training("all", moments="all")
    state, _ = training.step(training.start(), training.params, batch_of(0))
    assert residence(state.opt_state).host == 2 * 2 * 4 * 4 * LARGE


def test_the_allocation_itself_is_refused_inside_offload():
    training = Training("none")
    with pytest.raises(ConfigError, match="put offload, masks and partitions inside it"):
        optim.offload(training.tx).init(training.start().adapters)
