"""Adapters and moments in bfloat16: what is computed in fp32 and how it is rounded.

bfloat16 has eight bits of precision. A parameter moves only where its step exceeds half the
distance to the next number, 1/512 of it at worst, and a second moment that decays by 0.999 never
decays at all: rounded to the nearest, small steps are lost however many there are. So what is kept
from one update to the next is rounded stochastically, up with the probability of how far it is on
the way, which leaves its mean where fp32 would have it (Gupta et al., arXiv 1502.02551, section 3).

The alternatives cost memory, which is what bfloat16 is chosen for: an fp32 master is twice the
adapters again, streamed through every step where it lives on the host, and Kahan's compensation
once. Random bits cost none: they are computed within the update that uses them.

The update itself is rounded to nearest: that is an error of 1/512 of a step, whatever its size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jqlora.tree import fold_in_path
from jqlora.types import Path, PyTree

HALF = jnp.dtype(jnp.bfloat16)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """fp32 ``x`` in bfloat16, each entry to one of its two neighbours, on average to itself.

    What bfloat16 holds exactly stays as it is, infinities and NaN included.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = lax.bitcast_convert_type(kept, HALF)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(HALF))


def apply_updates(params: PyTree, updates: PyTree, key: jax.Array) -> PyTree:
    """``params + updates``: as ``optax.apply_updates``, but bfloat16 is added in fp32 and rounded
    stochastically, by ``key`` and the leaf's path."""

    def added(path: Any, leaf: Any, update: Any) -> Any:
        if leaf.dtype != HALF:
            return (leaf + update.astype(leaf.dtype)).astype(leaf.dtype)
        total = leaf.astype(jnp.float32) + update.astype(jnp.float32)
        return round_stochastically(total, fold_in_path(key, _names(path)))

    return jax.tree_util.tree_map_with_path(added, params, updates)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner`` computing in fp32 with a state in fp32, whatever the gradients' dtype, which its
    updates have again. For gradients in fp32 it is ``inner`` itself."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PyTree:
        return inner.init(as_float32(params))

    def update(updates: Any, state: PyTree, params: Any = None, **extra: Any) -> tuple[Any, PyTree]:
        found, state = inner.update(as_float32(updates), state, as_float32(params), **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), found, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


class SixteenBit(NamedTuple):
    """Of :func:`sixteen_bit`: the inner state, floating leaves in bfloat16, and the updates made,
    int32, which the random bits follow from."""

    inner: PyTree
    count: jax.Array


def sixteen_bit(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner`` with its state kept in bfloat16, rounded stochastically after every update.

    Random bits follow from the number of updates and a leaf's name, so that a resumed run draws the
    same. Pages of a leaf (:mod:`jqlora.optim.offload`) draw the same as each other.

    >>> tx = optax.chain(sixteen_bit(optax.scale_by_adam()), optax.scale(-1e-3))  # doctest: +SKIP
    """
    inner = in_float32(inner)

    def init(params: Any) -> SixteenBit:
        kept = jax.tree.map(
            lambda leaf: leaf.astype(HALF) if _is_float(leaf) else leaf, inner.init(params)
        )
        return SixteenBit(kept, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, whole = inner.update(updates, as_float32(state.inner), params, **extra)
        key = jax.random.fold_in(jax.random.key(0), state.count)

        def kept(path: Any, leaf: Any) -> Any:
            if not _is_float(leaf):
                return leaf
            return round_stochastically(leaf, fold_in_path(key, _names(path)))

        rounded = jax.tree_util.tree_map_with_path(kept, whole)
        return updates, SixteenBit(rounded, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def as_float32(tree: PyTree) -> PyTree:
    """A tree of arrays with those in bfloat16 widened."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == HALF else leaf, tree)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _names(path: Any) -> Path:
    return (jax.tree_util.keystr(path),)
