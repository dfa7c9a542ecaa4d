"""Whether a transformation updates every element by itself, found out by trying.

A small tree with the same names is updated twice, the second time with one row of one gradient
changed to NaN. NaN spreads through sums, norms, maxima and comparisons alike, so whatever differs
elsewhere has looked at that row. The tree is small: a rule that changes with a tensor's size is
tried as it is for a small one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jqlora.errors import ConfigError
from jqlora.optim.parts import Parts, named
from jqlora.tree import flatten, unflatten
from jqlora.types import Path

MOST_LEAVES = 6
ROWS, COLUMNS, SCALE = 4, 2, 100.0


def check_elementwise(inner: optax.GradientTransformation, leaves: Mapping[Path, Any]) -> None:
    """Raise :class:`ConfigError` where the update of one element of ``leaves`` depends on another.

    At most six leaves, spread over all of them, are tried.
    """
    kept = dict(list(leaves.items())[:: len(leaves) // MOST_LEAVES + 1])
    tried = next((path for path, leaf in kept.items() if leaf.ndim), None)
    if tried is None:
        return
    rng = np.random.default_rng(0)

    def random(leaf: Any) -> np.ndarray:
        shape = (ROWS, *(COLUMNS for _ in leaf.shape[1:])) if leaf.ndim else ()
        return (SCALE * rng.normal(size=shape)).astype(leaf.dtype)

    weights, gradients = ({path: random(leaf) for path, leaf in kept.items()} for _ in range(2))
    tainted = gradients | {tried: gradients[tried].copy()}
    tainted[tried][0] = np.nan
    clean, other = (_updated(inner, weights, found) for found in (gradients, tainted))
    mine = Parts(inner, weights).own(tried) | {tried}
    for key, before in clean.items():
        after = other[key]
        if key in mine and before.ndim:  # the row that changed may differ
            before, after = before[1:], after[1:]
        if not np.array_equal(before, after, equal_nan=True):
            raise ConfigError(
                "offload updates leaves and pages one at a time, but in what it was given the "
                f"update of one element depends on others (changing {'/'.join(tried)} changed "
                f"{_spelled(key)}): keep only what works element by element inside offload, such "
                "as optax.scale_by_adam(), and chain the rest, such as clipping by the global "
                "norm, around it"
            )


def _updated(
    inner: optax.GradientTransformation,
    weights: Mapping[Path, np.ndarray],
    gradients: Mapping[Path, np.ndarray],
) -> dict[Path | str, np.ndarray]:
    """Updates by path and new state by key path, after one update from the initial state."""
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(jnp.asarray, unflatten(weights))
        given = jax.tree.map(jnp.asarray, unflatten(gradients))
        updates: Any
        updates, state = inner.update(given, inner.init(params), params)
    found = flatten(updates) | named(state)
    return {key: np.asarray(leaf).astype(np.float64) for key, leaf in found.items()}


def _spelled(key: Path | str) -> str:
    return f"the state at {key}" if isinstance(key, str) else f"the update of {'/'.join(key)}"
