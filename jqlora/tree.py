"""Nested dicts by path: the one shape in which parameters, adapters and their specs meet.

Every node that is not a mapping is a leaf, so a ``QTensor`` (itself a pytree) stays whole.
"""

import difflib
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jqlora.types import Path


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Leaves of nested mappings by path, in the mappings' own order."""
    flat: dict[Path, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            flat.update(flatten(node, (*prefix, name)))
        else:
            flat[(*prefix, name)] = node
    return flat


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def fold_in_path(key: jax.Array, path: Path) -> jax.Array:
    """A PRNG key for one path: adding or removing other paths never changes it."""
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))


def dotted(component: str, *, last: bool) -> str:
    """One component of a module's path as in a dotted name: ``layers_3`` is ``layers.3``.

    The module's own name, the last, stays as it is, and so do names that Flax made (``Dense_1``).
    """
    match = re.fullmatch(r"([a-z].*)_(\d+)", component)
    return f"{match[1]}.{match[2]}" if match and not last else component


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like ``name``, best first, for error messages."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.3)
