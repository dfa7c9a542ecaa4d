"""The loss by chunks is the loss of whole logits, and these are never made."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import bind, init, plan
from jqlora.errors import AdapterNotReached
from jqlora.methods import LoRA
from jqlora.models import LlamaConfig, LlamaForCausalLM
from jqlora.quant import NF4, quantize_params
from jqlora.train import by_chunks, causal_lm_loss, cross_entropy

ROWS, LENGTH, VOCABULARY, WIDTH = 3, 13, 97, 32
SPECS = {
    "layers": LoRA(rank=2),
    "head": LoRA(rank=2, targets=["q_proj", "lm_head"]),
    "head trained whole": LoRA(rank=2, modules_to_save=["lm_head"]),
    "tied embedding trained whole": LoRA(rank=2, modules_to_save=["embed_tokens"]),
}
QUANTIZED = ("layers", "head")


@functools.cache
def model_of(tied):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    ids = jnp.zeros((1, 2), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(1), ids)["params"]


def made(name, quantized=False):
    """(apply, variables) with adapters away from their start."""
    model, params = model_of("tied" in name)
    if quantized:
        params = quantize_params(params, NF4(double_quant=True), skip=())
    planned = plan(model, params, SPECS[name])
    adapters = init(jax.random.key(2), planned, params)
    adapters = jax.tree.map(lambda leaf: leaf + 0.01, adapters)
    return bind(model, planned), {"params": params, **adapters}


def batch_of():
    ids = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, VOCABULARY, jnp.int32)
    segments = jnp.ones((ROWS, LENGTH), jnp.int32).at[1, 8:].set(2).at[2, 10:].set(0)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), ids.shape)
    mask = jnp.ones_like(ids).at[0, :4].set(0)
    names = ("input_ids", "positions", "segment_ids", "loss_mask")
    return dict(zip(names, (ids, positions, segments, mask), strict=True))


def whole(apply, variables, batch):
    inputs = {name: batch[name] for name in ("input_ids", "positions", "segment_ids")}
    return cross_entropy(apply(variables, **inputs).logits, batch)


@pytest.fixture
def small_chunks(monkeypatch):
    """Four tokens of each of the three rows; the last chunk has one."""
    monkeypatch.setattr(by_chunks, "CHUNK_TOKENS", 4 * ROWS)
    monkeypatch.setattr(by_chunks, "CHUNK_LOGITS", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("name", "quantized"),
    [*((name, False) for name in SPECS), *((name, True) for name in QUANTIZED)],
)
def test_loss_and_gradient_are_those_of_the_whole_logits(name, quantized):
    apply, variables = made(name, quantized)
    batch = batch_of()
    frozen = {"params": variables.pop("params")} if quantized else {}

    def graded(loss):
        def total(variables):
            value, count = loss(variables | frozen)
            return value, count

        return jax.jit(jax.value_and_grad(total, has_aux=True))(variables)

    (value, count), gradient = graded(lambda v: causal_lm_loss(apply, v, batch, None))
    (expected, tokens), theirs = graded(lambda v: whole(apply, v, batch))
    assert count == tokens
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())


@pytest.mark.usefixtures("small_chunks")
def test_no_array_holds_the_logits_of_the_batch_and_no_gradient_that_of_a_frozen_head():
    apply, variables = made("layers")
    batch = batch_of()

    def loss(adapters, params, batch):
        return causal_lm_loss(apply, {"params": params, **adapters}, batch, None)[0]

    adapters = {"lora": variables["lora"]}
    text = jax.jit(jax.grad(loss)).lower(adapters, variables["params"], batch).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]", text)
    sizes = {np.prod([int(n) for n in shape.split(",")]) for shape in shapes}
    assert ROWS * 4 * VOCABULARY in sizes
    assert max(sizes) < ROWS * LENGTH * VOCABULARY
    products = re.findall(rf"f32\[{WIDTH},{VOCABULARY}\]\S* (?:dot|add|fusion)\(", text)
    assert not products


def test_every_chunk_draws_its_own_dropout(monkeypatch):
    monkeypatch.setattr(by_chunks, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(by_chunks, "CHUNK_LOGITS", 1)
    model, params = model_of(False)
    planned = plan(model, params, LoRA(rank=2, targets=["lm_head"], dropout=0.5))
    fresh = init(jax.random.key(2), planned)
    adapters = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(4), leaf.shape), fresh)
    apply = bind(model, planned)
    sequence = jnp.arange(4, dtype=jnp.int32)
    twice = jnp.stack([sequence, sequence]).reshape(1, 8)
    chunk = jnp.repeat(jnp.arange(2, dtype=jnp.int32), 4)[None]
    batch = {"input_ids": twice, "positions": twice, "segment_ids": chunk + 1}

    @jax.jit
    def loss(key, mask):
        variables = {"params": params, **adapters}
        return causal_lm_loss(apply, variables, batch | {"loss_mask": mask}, key)[0]

    first, second = (loss(jax.random.key(3), (chunk == i).astype(jnp.int32)) for i in (0, 1))
    assert abs(first - second) > 1e-3
    assert first == loss(jax.random.key(3), (chunk == 0).astype(jnp.int32))
    undropped = [loss(None, (chunk == i).astype(jnp.int32)) for i in (0, 1)]
    np.testing.assert_allclose(*undropped, rtol=1e-6)


def test_a_planned_module_that_neither_part_calls_is_missed():
    class Headless(LlamaForCausalLM):
        def head(self, x):
            return x @ jnp.ones((WIDTH, VOCABULARY), x.dtype)

    _, params = model_of(False)
    model, _ = model_of(False)
    planned = plan(model, params, SPECS["head"])
    variables = {"params": params, **init(jax.random.key(2), planned)}
    apply = bind(Headless(model.config), planned)
    with pytest.raises(AdapterNotReached, match="lm_head"):
        causal_lm_loss(apply, variables, batch_of(), None)


@pytest.mark.parametrize(
    ("rows", "length", "vocabulary", "expected"),
    [
        (1, 2048, 128_256, 512),
        (8, 2048, 128_256, 64),
        (1024, 128, 128_256, 1),
        (1, 2048, 512, 2048),
        (4, 100, 49_152, 100),
        (1, 1030, 49_152, 344),
    ],
)
def test_chunks_are_even_and_within_the_limits(rows, length, vocabulary, expected):
    chunk = by_chunks.chunk_length(rows, length, vocabulary)
    assert chunk == expected
    assert chunk * -(-length // chunk) - length < length / 4
