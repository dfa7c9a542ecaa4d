"""Rotary position embeddings and their context extensions, one row of ``SCALINGS`` for each.

Su et al., RoFormer (arXiv:2104.09864), equation 34, in the split-half layout of Hugging Face
checkpoints. Frequencies are host constants computed once per trace in float32; dynamic NTK and
LongRoPE choose among them by the longest sequence of the batch.

Keys in a cache stay rotated as they were when they were written. Where a sequence grows past the
switch of LongRoPE while it is decoded, they are of the short set and the new ones of the long:
transformers then computes the cache anew, generation here refuses to cross the switch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Option: TypeAlias = float | int | bool | tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Which rotary embedding a model uses.

    ``options`` holds the parameters of ``type`` under their names in ``rope_parameters``, sorted,
    as pairs, so that a configuration stays hashable. ``partial`` is the part of each head, from its
    start, that is rotated.
    """

    type: str = "default"
    theta: float = 10000.0
    options: tuple[tuple[str, Option], ...] = ()
    partial: float = 1.0

    def option(self, name: str, default: Any = None) -> Any:
        """The option of this name, ``default`` where it is absent or null."""
        value = dict(self.options).get(name)
        return default if value is None else value


@dataclass(frozen=True)
class Scaling:
    """A way to extend the context: the option names it needs and may have, and its formula.

    ``compute(rope, head_dim, max_positions) -> (inverse frequencies f32 [head_dim / 2], factor)``;
    cos and sin are multiplied by the factor. ``adapt(rope, head_dim, max_positions, longest)``
    gives the frequencies instead where they depend on the longest sequence of the batch.
    """

    compute: Callable[[Rope, int, int], tuple[np.ndarray, float]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    adapt: Callable[[Rope, int, int, jax.Array], jax.Array] | None = None

    @property
    def known(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


def _wavelengths(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _default(rope: Rope, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    return 1 / _wavelengths(rope.theta, head_dim), 1.0


def _linear(rope: Rope, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """Position interpolation, arXiv:2306.15595."""
    return 1 / _wavelengths(rope.theta, head_dim) / np.float32(rope.option("factor")), 1.0


def _llama3(rope: Rope, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: slow waves are stretched, fast ones kept, those between are blended."""
    factor = rope.option("factor")
    low, high = rope.option("low_freq_factor"), rope.option("high_freq_factor")
    original = rope.option("original_max_position_embeddings", max_positions)
    frequencies = 1 / _wavelengths(rope.theta, head_dim)
    wavelengths = 2 * np.float32(math.pi) / frequencies
    blend = (original / wavelengths - np.float32(low)) / np.float32(high - low)
    stretched = frequencies / np.float32(factor)
    blended = (1 - blend) * stretched + blend * frequencies
    slow, fast = wavelengths > original / low, wavelengths < original / high
    return np.where(slow, stretched, np.where(fast, frequencies, blended)), 1.0


def _yarn(rope: Rope, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """YaRN, arXiv:2309.00071: interpolation by parts (section 3.2), attention scale (3.4)."""
    original = rope.option("original_max_position_embeddings", max_positions)
    factor = rope.option("factor", max_positions / original)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def dimension(rotations: float) -> float:
        turns = math.log(original / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    first = dimension(rope.option("beta_fast") or 32)
    last = dimension(rope.option("beta_slow") or 1)
    if rope.option("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = np.float32(last - first if last != first else 0.001)
    steps = np.arange(head_dim // 2, dtype=np.float32)
    keep = 1 - np.clip((steps - np.float32(first)) / width, 0, 1)
    wavelengths = _wavelengths(rope.theta, head_dim)
    stretched = 1 / (np.float32(factor) * wavelengths)
    frequencies = stretched * (1 - keep) + 1 / wavelengths * keep

    attention_factor = rope.option("attention_factor")
    if attention_factor is None:
        weight, over = rope.option("mscale"), rope.option("mscale_all_dim")
        attention_factor = magnitude(weight) / magnitude(over) if weight and over else magnitude(1)
    return frequencies.astype(np.float32), float(attention_factor)


def _dynamic(rope: Rope, head_dim: int, max_positions: int, longest: jax.Array) -> jax.Array:
    """NTK-aware base that grows with the longest sequence of the batch beyond ``max_positions``."""
    factor = rope.option("factor")
    length = jnp.maximum(longest, max_positions).astype(jnp.float32)
    stretch = factor * length / max_positions - (factor - 1)
    base = rope.theta * stretch ** (head_dim / (head_dim - 2))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return 1 / base ** jnp.asarray(exponents)


def _longrope(rope: Rope, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """LongRoPE, arXiv:2402.13753: a factor for each frequency, of the short set."""
    original = rope.option("original_max_position_embeddings", max_positions)
    factor = rope.option("factor", max_positions / original)
    attention_factor = rope.option("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0
        if factor > 1:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return _stretched(rope, "short_factor", head_dim), float(attention_factor)


def _stretched(rope: Rope, name: str, head_dim: int) -> np.ndarray:
    factors = np.asarray(rope.option(name), np.float32)
    return 1 / (factors * _wavelengths(rope.theta, head_dim))


def _switched(rope: Rope, head_dim: int, max_positions: int, longest: jax.Array) -> jax.Array:
    """The long set of LongRoPE for the whole batch once any sequence outgrows the original."""
    original = rope.option("original_max_position_embeddings", max_positions)
    short, long = (_stretched(rope, name, head_dim) for name in ("short_factor", "long_factor"))
    return jnp.where(longest > original, long, short)


SCALINGS: dict[str, Scaling] = {
    "default": Scaling(_default),
    "linear": Scaling(_linear, required=("factor",)),
    "dynamic": Scaling(_default, required=("factor",), adapt=_dynamic),
    "llama3": Scaling(
        _llama3,
        required=("factor", "low_freq_factor", "high_freq_factor"),
        optional=("original_max_position_embeddings",),
    ),
    "yarn": Scaling(
        _yarn,
        optional=(
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": Scaling(
        _longrope,
        required=("short_factor", "long_factor"),
        optional=("factor", "attention_factor", "original_max_position_embeddings"),
        adapt=_switched,
    ),
}


def rope_tables(
    rope: Rope, positions: jax.Array, *, head_dim: int, max_positions: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines float32 [B, T, rotated] for positions int32 [B, T].

    ``rotated`` is ``head_dim``, or the part of it that is rotated.
    """
    rotated = int(head_dim * rope.partial)
    scaling = SCALINGS[rope.type]
    host, factor = scaling.compute(rope, rotated, max_positions)
    frequencies = jnp.asarray(host)
    if scaling.adapt is not None:
        frequencies = scaling.adapt(rope, rotated, max_positions, jnp.max(positions) + 1)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """``x`` [B, T, heads, head_dim] turned by tables float32 [B | 1, T, rotated].

    In fp32 and rounded once, where transformers rounds the tables and every product to 16 bits;
    on a CPU each such rounding keeps the loop from its vector instructions.
    """
    dtype = x.dtype
    x, rest = jnp.split(x, [cos.shape[-1]], axis=-1)
    x = x.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    x = (x * cos[:, :, None, :] + turned * sin[:, :, None, :]).astype(dtype)
    return jnp.concatenate([x, rest], axis=-1) if rest.shape[-1] else x
