"""Several adapters of one model as one: side by side on a first axis of every leaf.

What adapters differ in becomes data. Ranks are padded with zeros to the largest; a module that an
adapter leaves alone gets zeros; scales and rates of dropout, which ``jq.bind`` computes from the
plan's specs, are stacked with them as the collection ``constants``. So one program serves all: to
train them under ``vmap`` (:mod:`jqlora.train.together`), or to use another one in every row of a
batch (``adapter_ids``). Of the base there is one, and each of its products is made once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqlora.errors import UnsupportedSite
from jqlora.graft import CONSTANTS
from jqlora.methods import Placement, Plan, method_of
from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, Path

Key = tuple[str, Path]
"""A method's collection and a module: what an adapter has at most one placement for."""


def stack(plans: Sequence[Plan], adapters: Sequence[Adapters]) -> tuple[Plan, dict[str, Any]]:
    """One plan, and adapters whose leaves have all the given ones on a new first axis ``[n]``.

    The plan is for ``jq.bind`` alone; files are written from the adapters' own. They may differ in
    method, modules, ranks, scales and dropout. Raises :class:`UnsupportedSite` for adapters of
    different models, and where not all train the same modules whole.

    >>> plan, adapters = stack([plan_a, plan_b], [a, b])             # doctest: +SKIP
    >>> variables = {"params": params, **adapters, "adapter_ids": jnp.array([0, 1, -1])}
    ...                                                              # doctest: +SKIP
    >>> bind(model, plan)(variables, ids_of_three_rows)              # doctest: +SKIP
    """
    own_constants = side_by_side([constants(plan) for plan in plans])
    return common_plan(plans), {**side_by_side(adapters), CONSTANTS: own_constants}


def side_by_side(members: Sequence[Adapters]) -> dict[str, Any]:
    """The members' leaves on a new first axis ``[n]``, each padded to the widest."""
    shapes = widest(members)
    padded = [flatten(pad(member, shapes)) for member in members]
    return unflatten({path: jnp.stack([member[path] for member in padded]) for path in shapes})


def common_plan(plans: Sequence[Plan]) -> Plan:
    """Everything that one of the plans adapts. Raises as :func:`stack` does."""
    found: dict[Key, Placement] = {}
    for placement in (p for plan in plans for p in plan.placements):
        key = (method_of(placement.spec).collection, placement.site.path)
        other = found.setdefault(key, placement)
        if other.site != placement.site:
            raise UnsupportedSite(
                f"adapters of different models: {placement.names[0]} is {placement.site.kind} "
                f"{placement.site.shape_in} x {placement.site.shape_out} in one and "
                f"{other.site.kind} {other.site.shape_in} x {other.site.shape_out} in another"
            )
        if placement.spec.dropout > other.spec.dropout:
            found[key] = placement
    whole = [{leaf.path for leaf in plan.full} for plan in plans]
    if differing := sorted({".".join(path) for paths in whole for path in paths ^ whole[0]}):
        raise UnsupportedSite(
            f"{', '.join(differing)}: trained whole by some of the adapters and not by others"
        )
    return Plan(tuple(found.values()), plans[0].full)


def constants(plan: Plan) -> dict[str, Any]:
    """What the plan's methods compute from their specs, as the collection ``constants``."""
    return unflatten(
        {
            (method.collection, *placement.site.path, name): jnp.asarray(leaf)
            for placement in plan.placements
            for method in [method_of(placement.spec)]
            for name, leaf in method.constants(placement).items()
        }
    )


def widest(members: Sequence[Adapters]) -> dict[Path, jax.ShapeDtypeStruct]:
    """The shape and dtype that hold each leaf of every member."""
    shapes: dict[Path, jax.ShapeDtypeStruct] = {}
    for path, leaf in (item for member in members for item in flatten(member).items()):
        before: Any = shapes.get(path, leaf)
        shape = tuple(np.maximum(before.shape, leaf.shape).tolist())
        shapes[path] = jax.ShapeDtypeStruct(shape, jnp.promote_types(before.dtype, leaf.dtype))
    return shapes


def pad(member: Adapters, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The member's leaves with zeros behind them, and zeros where it has none."""
    own = flatten(member)

    def padded(path: Path, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if path not in own:
            return jnp.zeros(wanted.shape, wanted.dtype)
        leaf = own[path].astype(wanted.dtype)
        behind = [(0, size - had, 0) for size, had in zip(wanted.shape, leaf.shape, strict=True)]
        return lax.pad(leaf, jnp.zeros((), leaf.dtype), behind)

    return unflatten({path: padded(path, wanted) for path, wanted in shapes.items()})


def crop(member: Adapters, like: Adapters) -> dict[str, Any]:
    """A padded member's leaves as wide as those of ``like``, and no others; undoes :func:`pad`."""
    found = flatten(member)
    return unflatten(
        {path: found[path][tuple(map(slice, leaf.shape))] for path, leaf in flatten(like).items()}
    )
