"""A run's step is compiled before its state is there, for just what the loop then calls it with."""

import jax
import pytest

from jqlora import optim
from jqlora.run.carrying import compiled_for_first
from jqlora.train import TrainState, make_train_step
from jqlora.train.checkpoint import Checkpoints
from jqlora.train.directory import RunDirectory
from tests.train import toy
from tests.train.compilations import compilations

pytestmark = pytest.mark.usefixtures("compile_quickly")


class Batches:
    total_steps, number = 4, 0

    def __next__(self):
        self.number += 1
        return toy.make_batch(self.number - 1)

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


def test_neither_a_fresh_nor_a_resumed_loop_compiles_its_step(tmp_path):
    run, tx = RunDirectory(tmp_path), optim.adamw(0.01)
    params = toy.init_params(jax.random.key(0))

    def create(_):
        return TrainState.create(toy.init_adapters(jax.random.key(1)), tx, jax.random.key(2))

    checkpoints = Checkpoints(run.checkpoints)
    for resumed in (False, True):
        batches, step = Batches(), make_train_step(toy.apply, tx)
        step = compiled_for_first(run, step, create, params, batches)
        assert batches.number == 0
        state = create(params)
        if resumed:
            state, _ = checkpoints.restore_latest(state)
        with compilations() as compiled:
            for _ in range(2):
                state, _ = step(state, params, next(batches))
        assert not compiled
        checkpoints.save(state, batches.get_state())
    assert int(state.step) == 4
