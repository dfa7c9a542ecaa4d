"""The loss by chunks is the loss of whole logits, and these are never made."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import bind, init, plan
from jqlora.errors import AdapterNotReached
from jqlora.methods import LoRA
from jqlora.models import LlamaForCausalLM, abstract_params, family_of
from jqlora.quant import NF4, quantize_params
from jqlora.train import by_chunks, causal_lm_loss, loss_for

ROWS, LENGTH, VOCABULARY, WIDTH = 3, 13, 97, 32
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BART = {
    "model_type": "bart",
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "max_position_embeddings": 24,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
}
MODELS = {
    "causal": ("causal-lm", SMALL | {"model_type": "llama"}),
    "causal, tied": ("causal-lm", SMALL | {"model_type": "llama", "tie_word_embeddings": True}),
    "bert": ("masked-lm", SMALL | {"model_type": "bert"}),
    "t5": ("seq2seq-lm", T5),
    "bart": ("seq2seq-lm", BART),
}
CASES = {
    "layers": ("causal", LoRA(rank=2)),
    "head": ("causal", LoRA(rank=2, targets=["q_proj", "lm_head"])),
    "head trained whole": ("causal", LoRA(rank=2, modules_to_save=["lm_head"])),
    "tied embedding trained whole": (
        "causal, tied",
        LoRA(rank=2, modules_to_save=["embed_tokens"]),
    ),
    "transform of BERT's head": ("bert", LoRA(rank=2, targets=["query", "transform.dense"])),
    "scaled tied logits of T5": ("t5", LoRA(rank=2, targets=["q", "wo"])),
    "biased logits of BART": ("bart", LoRA(rank=2, targets=["q_proj", "fc1"])),
}
QUANTIZED = ("layers", "head")


@functools.cache
def model_of(name):
    task, config = MODELS[name]
    family = family_of(config)
    model = family.build(family.parse(config), task=task)
    shapes = abstract_params(model)
    generator = np.random.default_rng(1)

    def draw(leaf):
        return jnp.asarray(generator.normal(0, 0.2, leaf.shape), leaf.dtype)

    return model, jax.tree.map(draw, shapes)


def made(name, quantized=False):
    """(apply, variables) with adapters away from their start."""
    model_name, spec = CASES[name]
    model, params = model_of(model_name)
    if quantized:
        params = quantize_params(params, NF4(double_quant=True), skip=())
    planned = plan(model, params, spec)
    adapters = init(jax.random.key(2), planned, params)
    adapters = jax.tree.map(lambda leaf: leaf + 0.01, adapters)
    return bind(model, planned), {"params": params, **adapters}


def batch_of(task="causal-lm") -> dict[str, Any]:
    ids = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, VOCABULARY, jnp.int32)
    segments = jnp.ones((ROWS, LENGTH), jnp.int32).at[1, 8:].set(2).at[2, 10:].set(0)
    mask = jnp.ones_like(ids).at[0, :4].set(0)
    if task != "causal-lm":
        labels = jnp.where(mask == 1, jnp.roll(ids, 2, axis=1), -100)
        return {"input_ids": ids, "attention_mask": jnp.minimum(segments, 1), "labels": labels}
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), ids.shape)
    names = ("input_ids", "positions", "segment_ids", "loss_mask")
    return dict(zip(names, (ids, positions, segments, mask), strict=True))


def largest(compiled):
    """Numbers of the largest fp32 array of a program, and of all of them."""
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text() or "")
    sizes = {math.prod(int(n) for n in shape.split(",")) for shape in shapes}
    return max(sizes), sizes


@pytest.fixture
def small_chunks(monkeypatch):
    """Four tokens of each of the three rows; the last chunk has one."""
    monkeypatch.setattr(by_chunks, "CHUNK_TOKENS", 4 * ROWS)
    monkeypatch.setattr(by_chunks, "CHUNK_LOGITS", 1)


@pytest.mark.usefixtures("small_chunks", "compile_quickly")
@pytest.mark.parametrize(
    ("name", "quantized"),
    [*((name, False) for name in CASES), *((name, True) for name in QUANTIZED)],
)
def test_loss_and_gradient_are_those_of_the_whole_logits(name, quantized):
    apply, variables = made(name, quantized)
    batch = batch_of(apply.model.task)
    loss = loss_for(apply.model)
    everything = name == "layers" and not quantized
    frozen = {} if everything else {"params": variables.pop("params")}

    def graded(apply):
        """Compiled: what is not bound to a model has its logits made whole."""
        total = jax.value_and_grad(lambda v: loss(apply, v | frozen, batch, None), has_aux=True)
        return jax.jit(total).lower(variables).compile()

    by_chunk, at_once = graded(apply), graded(lambda *args, **more: apply(*args, **more))
    assert ROWS * 4 * VOCABULARY in largest(by_chunk)[1]
    assert largest(by_chunk)[0] < ROWS * LENGTH * VOCABULARY <= largest(at_once)[0]
    (value, count), gradient = by_chunk(variables)
    (expected, tokens), theirs = at_once(variables)
    assert count == tokens
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())


@pytest.mark.usefixtures("small_chunks")
def test_a_step_makes_no_gradient_of_a_frozen_head():
    apply, variables = made("layers")
    batch = batch_of()

    def loss(adapters, params, batch):
        return causal_lm_loss(apply, {"params": params, **adapters}, batch, None)[0]

    adapters = {"lora": variables["lora"]}
    compiled = jax.jit(jax.grad(loss)).lower(adapters, variables["params"], batch).compile()
    assert largest(compiled)[0] < ROWS * LENGTH * VOCABULARY
    shape = rf"f32\[{WIDTH},{VOCABULARY}\]"
    assert not re.findall(rf"{shape}\S* (?:dot|add|fusion)\(", compiled.as_text() or "")


def test_every_chunk_draws_its_own_dropout(monkeypatch):
    monkeypatch.setattr(by_chunks, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(by_chunks, "CHUNK_LOGITS", 1)
    model, params = model_of("causal")
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

    _, params = model_of("causal")
    model, _ = model_of("causal")
    planned = plan(model, params, CASES["head"][1])
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
