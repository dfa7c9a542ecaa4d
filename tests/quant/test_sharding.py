"""A QLoRA step on a base in pieces on two devices: the same numbers, and no code travels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jqlora import tree
from jqlora.attach import bind, init, plan
from jqlora.errors import ConfigError
from jqlora.methods import LoRA
from jqlora.models import LlamaConfig, LlamaForCausalLM
from jqlora.optim import adamw
from jqlora.quant import (
    NF4,
    QTensor,
    quantize,
    quantize_params,
    quantized_matmul,
    split_inputs,
    split_outputs,
    with_layout,
)
from jqlora.train import TrainState, make_train_step
from tests.draws import draws
from tests.storages import STORAGES, stored

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=64,
)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("model",))


@pytest.fixture(scope="module")
def run():
    """(makers of step and state, params, batch) of a tiny model with a quantized base."""
    model = LlamaForCausalLM(CONFIG, remat="full")
    ids = jax.random.randint(jax.random.key(0), (2, 8), 0, 32, jnp.int32)
    dense = jax.jit(model.init)(jax.random.key(1), ids)["params"]
    params = quantize_params(dense, NF4(double_quant=True))
    planned = plan(model, params, LoRA(rank=2))
    tx = adamw(1e-2)
    ones = jnp.ones((2, 8), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    batch = {"input_ids": ids, "positions": positions, "segment_ids": ones, "loss_mask": ones}

    def start():
        return TrainState.create(init(jax.random.key(2), planned), tx, jax.random.key(3))

    return lambda: make_train_step(bind(model, planned), tx), start, params, batch


@pytest.fixture(scope="module")
def expected(run):
    """What one step on one device makes."""
    make_step, start, params, batch = run
    return make_step()(start(), params, batch)


def in_pieces(params, mesh):
    """Every quantized kernel split, alternately over outputs and over the inputs that meet them."""

    def place(path, leaf):
        whole = NamedSharding(mesh, PartitionSpec())
        if not isinstance(leaf, QTensor):
            return jax.device_put(leaf, whole)
        split = split_inputs if path[-2] in ("o_proj", "down_proj") else split_outputs
        return jax.device_put(leaf, split(leaf, mesh, "model"))

    flat = tree.flatten(params).items()
    return tree.unflatten({path: place(path, leaf) for path, leaf in flat})


def test_a_step_on_pieces_equals_the_step_on_the_whole_and_gathers_no_codes(
    run, expected, mesh, monkeypatch
):
    make_step, start, params, batch = run
    monkeypatch.setenv("JQLORA_KERNELS", "triton_interpret")
    state, batch = jax.device_put((start(), batch), NamedSharding(mesh, PartitionSpec()))
    pieces = in_pieces(params, mesh)
    compiled = make_step().lower(state, pieces, batch).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "u8" not in re.findall(r"= (\w+)\[[^\]]*\]\S* all-gather", text)
    after, metrics = compiled(state, pieces, batch)
    np.testing.assert_allclose(metrics["loss"], expected[1]["loss"], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (after.adapters, expected[0].adapters)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("storage", "split"),
    [
        ("gptq in order", split_outputs),
        ("gptq in order", split_inputs),
        # a row is one block, and no piece of it can be taken
        ("gptq of 8 bits", split_outputs),
    ],
)
def test_zero_points_and_orders_lie_with_their_pieces(mesh, storage, split):
    q = stored(draws(0)((2, 128, 64)), STORAGES[storage])
    x = draws(1)((3, 128))
    pieces = jax.device_put(q, split(q, mesh, "model"))
    assert len(pieces.scales.sharding.device_set) == 2

    @jax.jit
    def product(x, q):
        y, pull = jax.vjp(lambda x: quantized_matmul(x, q, jnp.int32(1)), x)
        return y, *pull(y)

    here = NamedSharding(mesh, PartitionSpec())
    text = product.lower(jax.device_put(x, here), pieces).compile().as_text()
    assert not {"u8", "s16"} & set(re.findall(r"= (\w+)\[[^\]]*\]\S* all-gather", text))
    for actual, expected in zip(
        product(jax.device_put(x, here), pieces), product(x, q), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * jnp.abs(expected).max())


@pytest.mark.parametrize(
    ("shape", "split", "layout", "said"),
    [
        ((128, 33), split_outputs, "bitsandbytes", "over its outputs into 2"),
        ((192, 32), split_inputs, "bitsandbytes", "over its inputs into 2"),
        ((128, 32), split_inputs, "hopper", "over its inputs into 2"),
        ((100, 32), split_outputs, "bitsandbytes", "blocks of 64"),
    ],
)
def test_pieces_that_would_cut_rows_or_blocks_are_refused(mesh, shape, split, layout, said):
    q = with_layout(quantize(jnp.ones(shape), NF4()), layout)
    with pytest.raises(ConfigError, match=said):
        split(q, mesh, "model")
