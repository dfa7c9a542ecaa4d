"""A causal language model in ten lines, with a frozen base and a low-rank adapter."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY, WIDTH, RANK = 11, 8, 2


def init_params(key):
    embed, head = jax.random.split(key)
    return {
        "embed": jax.random.normal(embed, (VOCABULARY, WIDTH)),
        "head": jax.random.normal(head, (WIDTH, VOCABULARY)),
    }


def init_adapters(key):
    a = jax.random.normal(key, (WIDTH, RANK))
    return {"lora": {"head": {"a": a, "b": jnp.zeros((RANK, VOCABULARY))}}}


def apply(variables, input_ids, *, positions, segment_ids, key=None, dropout=0.0):
    """Logits from a causal mean of embeddings within each segment."""
    del positions
    params, head = variables["params"], variables["lora"]["head"]
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]).astype(jnp.float32)
    weights = jnp.tril(same)
    hidden = (weights / weights.sum(-1, keepdims=True)) @ params["embed"][input_ids]
    low = hidden
    if key is not None and dropout:
        keep = jax.random.bernoulli(key, 1 - dropout, low.shape)
        low = jnp.where(keep, low / (1 - dropout), 0.0)
    a, b = (head[name].astype(low.dtype) for name in ("a", "b"))
    logits = hidden @ params["head"] + low @ a @ b
    return SimpleNamespace(logits=logits)


def make_batch(seed=0, rows=4, length=9):
    """Rows with different numbers of counted tokens, two segments, and padding at the end."""
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, length), np.int32)
    segments[:, length // 2 :] = 2
    segments[:, -1] = 0
    starts = rng.integers(0, length // 2, (rows, 1))
    return {
        "input_ids": rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
        "segment_ids": segments,
        "loss_mask": np.arange(length)[None] >= starts,
    }
