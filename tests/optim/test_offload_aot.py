"""What offloading takes off a GPU, from the compiler's assignment of buffers."""

import jax
import jax.numpy as jnp
import pytest

from jqlora.attach import bind, init, plan
from jqlora.methods import LoRA
from jqlora.models import LlamaConfig, LlamaForCausalLM, abstract_params
from jqlora.optim import adamw
from jqlora.optim.offload import PAGE_BYTES, SMALLEST
from jqlora.train import TrainState, make_train_step
from jqlora.train.placement import compiled_bytes
from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
]
WIDTH, LAYERS, RANK = 1024, 8, 512


def compiled(*, offload):
    """The step of a small model with large adapters, and the bytes of its state on the host."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
    )
    model = LlamaForCausalLM(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full")
    params = abstract_params(model)
    planned = plan(model, params, LoRA(rank=RANK))
    tx = adamw(1e-4, offload=offload)
    state = jax.eval_shape(
        lambda: TrainState.create(init(jax.random.key(0), planned), tx, jax.random.key(1))
    )
    mesh = aot.mesh(TARGETS["h100"])
    device = jax.NamedSharding(mesh, jax.P())
    # a mesh of absent devices forgets memory kinds, an abstract one keeps them
    host = jax.NamedSharding(mesh.abstract_mesh, jax.P(), memory_kind="pinned_host")

    def placed(leaf, sharding=device):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def moment(leaf):
        return placed(leaf, host if offload == "all" and leaf.size >= SMALLEST else device)

    away = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.size >= SMALLEST
    )
    opt_state = jax.tree.map(moment, state.opt_state)
    state = jax.tree.map(placed, state).replace(opt_state=opt_state)
    row = jax.ShapeDtypeStruct((1, 128), jnp.int32, sharding=device)
    names = ("input_ids", "positions", "segment_ids", "loss_mask")
    step = make_train_step(bind(model, planned), tx)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = step.lower(state, jax.tree.map(placed, params), dict.fromkeys(names, row))
        return lowered.compile(), away


def test_device_memory_falls_by_the_state_but_for_pages():
    plain, state = compiled(offload="none")
    paged, _ = compiled(offload="all")
    saved = compiled_bytes(plain) - compiled_bytes(paged)
    largest = 4 * LAYERS * RANK * 2 * WIDTH
    pages = 2 * 2 * min(PAGE_BYTES, largest)  # two moments, read and written
    assert saved >= state - pages
    memory = paged.memory_analysis()
    # on the host the state is updated in place: no second copy of it
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == state
    assert memory.host_temp_size_in_bytes == 0
