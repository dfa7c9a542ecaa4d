"""From logits to the scores that the next token is drawn from.

The scores follow transformers' processors in its own order: repetition penalty, temperature,
top-k, top-p; the distribution is the softmax of what they leave.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jqlora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the best one (greedy).

    ``top_k`` 0 and ``top_p`` 1 switch those filters off. Raises ConfigError on values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, good, accepted in (
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0,
                "above 0; 1 is off",
            ),
        ):
            if not good:
                raise ConfigError(f"{name}={value} is out of range; accepted: {accepted}")


def penalize(scores: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Scores f32 [B, V], those of tokens already ``seen`` bool [B, V] made less likely.

    CTRL (arXiv:1909.05858, section 4.1): positive scores are divided, negative ones multiplied.
    """
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: jax.Array, k: int) -> jax.Array:
    """Scores [B, V] with all below the ``k``-th largest at -inf; ties with it are kept."""
    least = jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]
    return jnp.where(scores < least, -jnp.inf, scores)


def keep_top_p(scores: jax.Array, p: float) -> jax.Array:
    """Scores [B, V] with the tail outside the nucleus of mass ``p`` at -inf (arXiv:1904.09751).

    The nucleus is the smallest set of best tokens whose mass reaches ``p``; never empty.
    """
    order = jnp.argsort(scores, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1)), axis=-1)
    drop = (mass <= 1 - p).at[:, -1].set(False)
    places = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(drop, places, axis=-1), -jnp.inf, scores)


def process(scores: jax.Array, seen: jax.Array, sampling: Sampling) -> jax.Array:
    """The scores f32 [B, V] whose softmax is sampled from, given tokens ``seen`` bool [B, V]."""
    if sampling.repetition_penalty != 1:
        scores = penalize(scores, seen, sampling.repetition_penalty)
    if sampling.temperature > 0:
        scores = scores / sampling.temperature
        if sampling.top_k:
            scores = keep_top_k(scores, sampling.top_k)
        if sampling.top_p < 1:
            scores = keep_top_p(scores, sampling.top_p)
    return scores
