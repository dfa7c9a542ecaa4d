"""What AdaLoRA leaves after training: pruned triplets taken out, or the rest folded into LoRA.

While training, a pruned triplet is one whose λ is zero; it keeps its place, because shapes are
static. Afterwards it is dead weight. Both functions leave the model's output as it is.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqlora.errors import UnsupportedSite
from jqlora.methods import AdaLoRA, LoRA, Placement, Plan
from jqlora.methods.adalora import METHOD, ranks, scale_of, used
from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, Path


def compact(plan: Plan, adapters: Adapters) -> tuple[Plan, dict[str, Any]]:
    """The plan and adapters without AdaLoRA's triplets whose λ is zero.

    Each module then has a rank of its own, named in the specs' ``rank_pattern``; layers of one
    stack are padded to the largest. A module may be left with none. Everything but AdaLoRA stays as
    it is, and so does the scale, which is that of the initial rank.
    """
    flat: dict[Path, Any] = flatten(adapters)
    patterns = {p.spec: dict(p.spec.rank_pattern) for p in _adaptive(plan)}
    keeps: dict[Path, np.ndarray] = {}
    for placement in _adaptive(plan):
        spec, there = placement.spec, used(placement)
        lam = np.asarray(flat[_leaf(placement, "lam")])[..., 0, :]
        keep = keeps[placement.site.path] = (lam != 0) & there
        rows = keep.reshape(-1, keep.shape[-1])
        for name, row, rank in zip(placement.site.names, rows, ranks(placement), strict=True):
            if name in placement.names:
                before = np.asarray(patterns[spec].get(name, (True,) * spec.init_rank))
                after = np.zeros(spec.init_rank, bool)
                after[np.flatnonzero(before)] = row[:rank]
                patterns[spec][name] = tuple(after.tolist())
    specs = {old: dataclasses.replace(old, rank_pattern=new) for old, new in patterns.items()}
    compacted = _with_specs(plan, specs)
    for old, new in zip(plan.placements, compacted.placements, strict=True):
        if old.spec in specs:
            _gather(flat, old, keeps[old.site.path], width=used(new).shape[-1])
    return compacted, unflatten(flat)


def as_lora(plan: Plan, adapters: Adapters) -> tuple[Plan, dict[str, Any]]:
    """The same adapters as plain LoRA of a rank per module: a = s · PΛ, b = Q.

    Triplets whose λ is zero are left out, and modules without any other. ``alpha`` is each module's
    rank, so that the scale is 1. For programs that know no AdaLoRA. Raises
    :class:`UnsupportedSite` where a module has LoRA beside AdaLoRA.
    """
    plan, adapters = compact(plan, adapters)
    flat: dict[Path, Any] = flatten(adapters)
    both = {p.site.path for p in plan.placements if isinstance(p.spec, LoRA)}
    specs = {spec: _lora_spec(spec, plan) for spec in {p.spec for p in _adaptive(plan)}}
    placements = []
    for placement in plan.placements:
        if placement.spec not in specs:
            placements.append(placement)
            continue
        if placement.site.path in both:
            raise UnsupportedSite(f"{placement.names[0]} has LoRA already, beside AdaLoRA")
        p, lam, q = (flat.pop(_leaf(placement, name)) for name in ("p", "lam", "q"))
        left = tuple(rank > 0 for rank in ranks(placement))
        if any(left):
            placements.append(Placement(placement.site, specs[placement.spec], left))
            # in fp32: the product of what bfloat16 holds is not held by it
            p, lam, q = (leaf.astype(jnp.float32) for leaf in (p, lam, q))
            flat["lora", *placement.site.path, "a"] = p * lam * scale_of(placement.spec)
            flat["lora", *placement.site.path, "b"] = q
    return dataclasses.replace(plan, placements=tuple(placements)), unflatten(flat)


def _adaptive(plan: Plan) -> list[Placement]:
    return [p for p in plan.placements if isinstance(p.spec, AdaLoRA)]


def _leaf(placement: Placement, name: str) -> Path:
    return (METHOD.collection, *placement.site.path, name)


def _with_specs(plan: Plan, specs: dict[AdaLoRA, AdaLoRA]) -> Plan:
    placements = (dataclasses.replace(p, spec=specs.get(p.spec, p.spec)) for p in plan.placements)
    return dataclasses.replace(plan, placements=tuple(placements))


def _gather(flat: dict[Path, Any], placement: Placement, keep: np.ndarray, *, width: int) -> None:
    """Move the kept triplets of every layer to the front and cut its leaves to ``width``."""
    order = np.argsort(~keep, axis=-1, kind="stable")[..., :width]
    there = np.take_along_axis(keep, order, axis=-1)
    for name, axis in (("p", -1), ("lam", -1), ("q", -2)):
        leaf = np.asarray(flat[_leaf(placement, name)])
        other = -2 if axis == -1 else -1
        index, real = np.expand_dims(order, other), np.expand_dims(there, other)
        taken = np.take_along_axis(leaf, index, axis=axis)
        flat[_leaf(placement, name)] = jnp.asarray(taken * real.astype(leaf.dtype))


def _lora_spec(spec: AdaLoRA, plan: Plan) -> LoRA:
    """LoRA on the modules where triplets are left, each with ``alpha`` equal to its rank."""
    left = {
        name: rank
        for placement in plan.placements
        if placement.spec == spec
        for name, rank in zip(placement.site.names, ranks(placement), strict=True)
        if rank
    }
    if not left:
        raise UnsupportedSite("no triplet is left: every λ is zero, as before training")
    most = max(left.values())
    pattern = {name: rank for name, rank in left.items() if rank != most}
    return LoRA(
        rank=most,
        alpha=most,
        targets=tuple(left),
        dropout=spec.dropout,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        modules_to_save=spec.modules_to_save,
    )
