"""The part of an optimizer's state that belongs to some of the leaves, found by name.

Optax keeps a tree shaped like the parameters for each moment, inside tuples of its own. Where a
transformation treats every leaf by itself, the state of a few leaves is what it would make for
those leaves alone; and as adapters are nested dicts, what is in that smaller state has the same key
paths as in the whole one. So a state is a mapping from key paths to arrays, out of which smaller
states are taken and into which they are put back. What a state of no leaves holds, such as counts
of updates, is shared by all.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import optax

from jqlora.tree import unflatten
from jqlora.types import Path, PyTree

Named: TypeAlias = dict[str, Any]
"""Leaves of a state by key path, written as JAX writes it: ``.mu['lora']['q_proj']['a']``."""


def named(state: PyTree) -> Named:
    """Every leaf of a state by its key path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(key): leaf for key, leaf in leaves}


def renamed(like: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """A state like ``like``, with the leaves that ``leaves`` has under the same key paths."""
    return jax.tree_util.tree_map_with_path(lambda key, _: leaves[jax.tree_util.keystr(key)], like)


class Parts:
    """States of ``inner`` for some of ``leaves``, by path; shapes of the leaves suffice."""

    def __init__(self, inner: optax.GradientTransformation, leaves: Mapping[Path, Any]):
        self._inner = inner
        self._leaves = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()
        }
        self.shared = frozenset(named(self.template(())))

    def template(self, paths: Iterable[Path]) -> PyTree:
        """The state of the leaves at ``paths``, as shapes."""
        leaves = unflatten({path: self._leaves[path] for path in paths})
        return jax.eval_shape(self._inner.init, leaves)

    def own(self, path: Path) -> frozenset[str]:
        """Key paths of what belongs to one leaf alone."""
        return frozenset(named(self.template([path]))) - self.shared
