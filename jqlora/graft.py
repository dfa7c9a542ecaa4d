"""Where adapters stand while a model is applied: beside the matrices of their modules.

The params tree that the model is given has every adapter leaf as a sibling of the kernel it serves,
and of a quantized stack the layers' numbers instead of the codes; see :mod:`jqlora.attach` for why.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jqlora.errors import UnsupportedSite
from jqlora.methods import COLLECTIONS, FULL, Placement, Plan, method_of
from jqlora.methods.by_row import ADAPTER_IDS
from jqlora.quant import QTensor
from jqlora.tree import flatten, fold_in_path, unflatten
from jqlora.types import Adapters, Params, Path, Variables

PREFIX = "jqlora_"
INDEX = PREFIX + "index"
CONSTANTS = "constants"
"""The collection of what methods compute from their specs, where it is given beside the adapters:
those of a stack (:mod:`jqlora.stacking`) differ in it."""
OURS = COLLECTIONS | {FULL, CONSTANTS, ADAPTER_IDS}
"""Collections that a model is not given as they are."""


def check_collections(variables: Variables, plan: Plan) -> None:
    """Raise ``ValueError`` where ``variables`` are not the planned collections."""
    if ADAPTER_IDS in variables and (CONSTANTS not in variables or plan.full):
        raise ValueError(
            f"'{ADAPTER_IDS}' needs the adapters of jq.stack, and none with modules trained whole"
        )
    planned = {method_of(placement.spec).collection for placement in plan.placements}
    planned |= {FULL} if plan.full else set()
    given = OURS & set(variables) - {CONSTANTS, ADAPTER_IDS}
    if missing := sorted(planned - given):
        raise ValueError(f"variables lack the planned collections {missing}: pass **adapters")
    if extra := sorted(given - planned):
        raise ValueError(f"variables hold {extra}, which the bound plan knows nothing of")


def graft(
    variables: Variables, placements: Sequence[Placement], key: jax.Array | None
) -> tuple[dict[str, Any], dict[Path, QTensor]]:
    """The params tree to give the model, and the quantized kernels by module, left out of it."""
    flat = override(variables["params"], variables.get(FULL, {}))
    if taken := [path for path in flat if path[-1].startswith(PREFIX)]:
        raise ValueError(f"parameter {'/'.join(taken[0])} has the reserved prefix {PREFIX}")
    quantized: dict[Path, QTensor] = {}
    for path in [p for p, leaf in flat.items() if isinstance(leaf, QTensor)]:
        leaf = flat.pop(path)
        if path[-1] != "kernel":
            raise UnsupportedSite(f"{'/'.join(path)} is quantized, but only dense kernels can be")
        quantized[path[:-1]] = leaf.flat_lead() if leaf.lead else leaf
        if leaf.lead:
            index = jnp.arange(math.prod(leaf.lead), dtype=jnp.int32).reshape(leaf.lead)
            flat[(*path[:-1], INDEX)] = index
    for placement in placements:
        method, site = method_of(placement.spec), placement.site
        leaves = dict(at(variables[method.collection], site.path))
        leaves |= _constants(placement, variables)
        if ADAPTER_IDS in variables:
            # behind the lead axes, which the model slices
            depth = len(site.lead)
            leaves = {name: jnp.moveaxis(leaf, 0, depth) for name, leaf in leaves.items()}
        if key is not None and placement.spec.dropout:
            keys = jnp.stack([fold_in_path(key, tuple(n.split("."))) for n in site.names])
            leaves["key"] = keys.reshape(site.lead)
        for name, leaf in leaves.items():
            flat[(*site.path, f"{PREFIX}{method.collection}_{name}")] = leaf
    return unflatten(flat), quantized


def _constants(placement: Placement, variables: Variables) -> dict[str, jax.Array]:
    """What the method computes from its spec, or what ``variables`` have in its place."""
    method = method_of(placement.spec)
    if CONSTANTS in variables:
        return dict(at(variables[CONSTANTS][method.collection], placement.site.path))
    return {name: jnp.asarray(leaf) for name, leaf in method.constants(placement).items()}


def override(params: Params, full: Adapters) -> dict[Path, Any]:
    """Flat ``params`` with the leaves of ``full`` in place of the originals, in the originals'
    dtype."""
    flat = flatten(params)
    for path, leaf in flatten(full).items():
        if path not in flat:
            raise ValueError(f"full/{'/'.join(path)} overrides no parameter of the model")
        flat[path] = leaf.astype(flat[path].dtype)
    return flat


def at(tree: Adapters, path: Path) -> Mapping[str, Any]:
    """A module's leaves. Raises ``ValueError`` where there are none."""
    for name in path:
        if name not in tree:
            raise ValueError(f"the adapters hold no leaves for {'.'.join(path)}")
        tree = tree[name]
    return tree


def dense(leaf: Any) -> jax.Array:
    """The matrix that a leaf of ``params`` stands for."""
    return _decoded(leaf) if isinstance(leaf, QTensor) else leaf


@jax.jit  # one program, where seventeen small ones would each write an array of W's size
def _decoded(leaf: QTensor) -> jax.Array:
    return leaf.dequantize()
