"""How much each entry of AdaLoRA's P, Λ and Q matters to the loss, as an optax transformation.

    I = |w · ∂L/∂w|                                   (Zhang et al., arXiv 2303.10512, eq. 8)
    Ī ← β1 Ī + (1 - β1) I                             (eq. 9)
    Ū ← β2 Ū + (1 - β2) |I - Ī|                       (eq. 10), both from zero and uncorrected
    s = Ī Ū                                           (eq. 11)

Gradients go in and s comes out. As every entry is treated by itself, the two means can live
wherever an optimizer's moments can: see :mod:`jqlora.optim.offload`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jqlora.tree import flatten
from jqlora.types import Path, PyTree


class Sensitivity(NamedTuple):
    """``importance`` (Ī) and ``uncertainty`` (Ū), each shaped like the parameters."""

    importance: PyTree
    uncertainty: PyTree


def sensitivity(betas: tuple[float, float]) -> optax.GradientTransformationExtraArgs:
    """s of every entry, given its gradient and, as parameter, its weight.

    ``update(..., smooth=False)``, which may be traced, leaves Ī and Ū as they are.
    """

    def init(params: PyTree) -> Sensitivity:
        return Sensitivity(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(
        updates: Any, state: Any, params: Any = None, *, smooth: Any = True, **extra: Any
    ) -> tuple[Any, Sensitivity]:
        del extra

        def importance(old: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
            return jnp.where(smooth, betas[0] * old + (1 - betas[0]) * jnp.abs(w * g), old)

        def uncertainty(old: jax.Array, mean: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
            away = jnp.abs(jnp.abs(w * g) - mean)
            return jnp.where(smooth, betas[1] * old + (1 - betas[1]) * away, old)

        means = jax.tree.map(importance, state.importance, params, updates)
        spread = jax.tree.map(uncertainty, state.uncertainty, means, params, updates)
        return jax.tree.map(jnp.multiply, means, spread), Sensitivity(means, spread)

    return optax.GradientTransformationExtraArgs(init, update)


def triplet_scores(entries: PyTree) -> dict[Path, jax.Array]:
    """Score of every triplet by module, ``[*lead, 1, R]``, from s of its entries.

    s(λ) + mean of s over its column of P + mean over its row of Q (eq. 7).
    """
    flat = flatten(entries)
    return {
        path[:-1]: lam
        + (
            flat[(*path[:-1], "p")].mean(-2, keepdims=True)
            + flat[(*path[:-1], "q")].mean(-1)[..., None, :]
        )
        for path, lam in flat.items()
        if path[-1] == "lam"
    }
