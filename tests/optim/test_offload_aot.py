"""What offloading takes off a GPU, from the compiler's assignment of buffers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jqlora import optim
from jqlora.attach import bind, init, plan
from jqlora.methods import AdaLoRA, LoRA
from jqlora.optim.offload import PAGE_BYTES
from jqlora.optim.residence import planned, planned_residence
from jqlora.train import TrainState, make_train_step
from jqlora.train.placement import compiled_bytes, lower_on
from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
]
WIDTH, LAYERS, RANK = 1024, 8, 512
X = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32)


class Layer(nn.Module):
    """Two matrices and a residual."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(2 * WIDTH, use_bias=False, name="up")(x)
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(nn.silu(h)), None


class Stack(nn.Module):
    """Layers under one scan, so that every leaf can be cut into pages."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Layer), length=LAYERS, **axes)(name="layers")(x, None)[0]


def mean_square(apply, variables, batch, key):
    return (apply(variables, batch["x"]) ** 2).sum(), jnp.ones(())


def adamw(ours, offload):
    return optim.adamw(1e-4, offload=offload)


def adalora(ours, offload):
    schedule = {"total_steps": 10, "initial_steps": 2, "final_steps": 3}
    return optim.adalora(adamw(ours, offload), ours, **schedule, offload=offload)


def compiled(spec, make, offload):
    """The step with large adapters, and the bytes of its state on the host."""
    model = Stack()
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    ours = plan(model, params, spec, X)
    tx = make(ours, offload)

    def create():
        return TrainState.create(init(jax.random.key(0), ours), tx, jax.random.key(1))

    step = make_train_step(bind(model, ours), tx, loss=mean_square)
    away = planned_residence(*planned(create)).host
    return lower_on(aot.mesh(TARGETS["h100"]), step, create, params, {"x": X}).compile(), away


CASES = {
    "moments": (LoRA(rank=RANK, targets=["up", "down"]), adamw, 2),
    "moments and AdaLoRA's means": (
        AdaLoRA(init_rank=RANK, target_rank=RANK // 2, targets=["up", "down"]),
        adalora,
        4,
    ),
}


@pytest.mark.parametrize(("spec", "make", "copies"), CASES.values(), ids=CASES.keys())
def test_device_memory_falls_by_the_state_but_for_pages(spec, make, copies):
    plain, nothing = compiled(spec, make, "none")
    paged, state = compiled(spec, make, "all")
    adapters = 4 * 2 * LAYERS * RANK * 3 * WIDTH
    assert nothing == 0
    assert state == copies * adapters
    largest = 4 * LAYERS * RANK * 2 * WIDTH
    pages = 2 * 2 * min(PAGE_BYTES, largest)  # two arrays at a time, read and written
    assert compiled_bytes(plain) - compiled_bytes(paged) >= state - pages
    memory = paged.memory_analysis()
    # on the host the state is updated in place: no second copy of it
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == state
    assert memory.host_temp_size_in_bytes == 0
