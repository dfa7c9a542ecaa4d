"""Schedules against transformers' own, update by update."""

import jax
import numpy as np
import pytest

from jqlora import optim

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

STEPS = 40


def theirs(name: str, warmup: int) -> list[float]:
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    name = {"constant": "constant_with_warmup"}.get(name, name)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", sorted(optim.SCHEDULES))
def test_a_schedule_equals_the_one_of_transformers(name, warmup):
    schedule = optim.SCHEDULES[name](3e-4, steps=STEPS, warmup=warmup)
    with jax.numpy_dtype_promotion("standard"):
        ours = [float(schedule(np.int32(step))) for step in range(STEPS)]
    np.testing.assert_allclose(ours, theirs(name, warmup), rtol=1e-5, atol=1e-10)
