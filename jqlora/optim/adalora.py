"""AdaLoRA's allocation of ranks as an optax transformation (Zhang et al., arXiv 2303.10512).

Around any optimizer, for the whole model at once, after every update:

1. the sensitivity of every entry of P, Λ and Q, with L including its penalty, is followed by two
   means, and from these a triplet gets its score (:mod:`jqlora.optim.sensitivity`);
2. when the schedule (:mod:`jqlora.optim.budget`) says so, the budget's best triplets of all layers
   and modules are kept, and the λ of every other is set to zero through the update.

A pruned λ is still trained between two such steps, so that a triplet may return. From update
T - t_f on the pattern is frozen and applied after every update.

It is all inside the compiled step, with static shapes: nothing has to be called, nothing
recompiles, and the importances are part of the optimizer state, hence of every checkpoint.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jqlora.errors import ConfigError
from jqlora.methods import AdaLoRA, Placement, Plan
from jqlora.methods.adalora import METHOD, ranks, used
from jqlora.optim.budget import Budget
from jqlora.optim.offload import Offload
from jqlora.optim.offload import offload as offloaded
from jqlora.optim.residence import mark
from jqlora.optim.rounding import as_float32
from jqlora.optim.sensitivity import Sensitivity, sensitivity, triplet_scores
from jqlora.tree import flatten, unflatten
from jqlora.types import Path, PyTree

COLLECTION = METHOD.collection
Flat = dict[Path, jax.Array]


@dataclasses.dataclass(frozen=True)
class Convention:
    """Where the paper and PEFT 0.21 (which follows the authors' code) differ; one line each."""

    weight_after_update: bool
    """w in |w · ∂L/∂w|: before the update in algorithm 1; after it in PEFT, whose
    ``update_and_allocate`` follows ``optimizer.step()``."""
    importance_freezes: bool
    """Ī and Ū stop at update T - t_f - 1 in PEFT (``RankAllocator.update_and_allocate``), so that
    the last choice uses those of one update before; algorithm 1 has them go on."""
    ties_are_pruned: bool
    """PEFT prunes every score ``<=`` the k-th smallest (``mask_to_budget``), which at ties is more
    than the budget asks; the paper keeps the top b(t), here by order where scores are equal."""


CONVENTIONS = {
    "paper": Convention(False, False, False),
    "peft": Convention(True, True, True),
}


class AdaLoRAState(NamedTuple):
    """Of :func:`adalora`. ``importance`` (Ī) and ``uncertainty`` (Ū) are shaped like the collection
    ``adalora``; ``kept`` holds booleans ``[*lead, 1, R]`` by module; ``budget`` is b(t), int32;
    ``places`` is a :func:`~jqlora.optim.residence.mark`."""

    inner: PyTree
    count: jax.Array
    importance: PyTree
    uncertainty: PyTree
    kept: PyTree
    budget: jax.Array
    places: PyTree


def adalora(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    total_steps: int,
    initial_steps: int,
    final_steps: int,
    interval: int = 10,
    target_total_rank: int | None = None,
    betas: tuple[float, float] = (0.85, 0.85),
    convention: str = "peft",
    offload: Offload = "none",
) -> optax.GradientTransformationExtraArgs:
    """``inner``, and AdaLoRA's allocation of ranks to the modules of ``plan`` after each update.

    ``initial_steps``, ``final_steps`` and ``interval`` are t_i, t_f and ΔT of ``total_steps``
    updates; PEFT's ``tinit``, ``tfinal`` and ``deltaT``, with ``global_step`` the number of updates
    made. The triplets left at the end are the specs' ``target_rank`` times their modules, or
    ``target_total_rank``. ``convention`` is ``"paper"`` or ``"peft"`` (:class:`Convention`).
    ``offload`` says of Ī and Ū what ``jq.optim.adamw``'s says of its moments, which are ``inner``'s
    own affair.

    Sensitivities are taken from the gradients that this transformation is given. PEFT sees them
    clipped: for the same, clip in front of it and not inside ``inner``. Collections other than
    ``adalora`` pass through to ``inner``.

    Raises :class:`ConfigError` for a plan without AdaLoRA, for a schedule that cannot be, and in
    ``init`` for adapters that are not the whole plan's.

    >>> tx = adalora(optax.adamw(1e-3), plan, total_steps=1000, initial_steps=100,
    ...              final_steps=300)                                        # doctest: +SKIP
    """
    inner = optax.with_extra_args_support(inner)
    placements = allocated(plan)
    if not placements:
        raise ConfigError("optim.adalora needs a plan with jq.AdaLoRA, whose triplets it allots")
    if convention not in CONVENTIONS:
        raise ConfigError(f"convention={convention!r}: known are {', '.join(CONVENTIONS)}")
    if not all(0 < beta < 1 for beta in betas):
        raise ConfigError(f"betas={betas}: both must lie between 0 and 1")
    rule = CONVENTIONS[convention]
    budget = budget_of(
        plan,
        target_total_rank=target_total_rank,
        total_steps=total_steps,
        initial_steps=initial_steps,
        final_steps=final_steps,
        interval=interval,
    )
    real = {p.site.path: used(p)[..., None, :] for p in placements}
    followed = sensitivity(betas)
    if offload != "none":
        followed = offloaded(followed)
    steps = range(total_steps + 1)
    budgets = np.asarray([budget.after(t) for t in steps], np.int32)
    choosing = np.asarray([budget.chooses(t) for t in steps])

    def init(params: Any) -> AdaLoRAState:
        _check_whole(params, real)
        means: Any = followed.init(as_float32(params[COLLECTION]))
        return AdaLoRAState(
            inner=inner.init(params),
            count=jnp.zeros((), jnp.int32),
            importance=means.importance,
            uncertainty=means.uncertainty,
            kept=_tree({path: jnp.asarray(there) for path, there in real.items()}),
            budget=jnp.asarray(budgets[0]),
            places=mark(open=offload == "auto"),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, AdaLoRAState]:
        if params is None:
            raise ValueError("optim.adalora needs the parameters: tx.update(gradients, state, p)")
        gradients = updates
        updates, inner_state = inner.update(gradients, state.inner, params, **extra)
        count = state.count + 1
        step = jnp.minimum(count, total_steps)
        chooses = jnp.asarray(choosing)[step] & (count <= total_steps)
        allowed = jnp.asarray(budgets)[step]
        weights: Any = params[COLLECTION]
        if rule.weight_after_update:
            weights = optax.apply_updates(weights, updates[COLLECTION])
        smooth = jnp.asarray(True)
        if rule.importance_freezes:
            smooth = count < budget.frozen_from
        means: Any = Sensitivity(state.importance, state.uncertainty)
        entries, means = followed.update(
            as_float32(gradients[COLLECTION]), means, as_float32(weights), smooth=smooth
        )
        scores = triplet_scores(entries)

        def choose() -> PyTree:
            return _tree(_best(scores, real, allowed, ties_are_pruned=rule.ties_are_pruned))

        chosen = jax.lax.cond(chooses, choose, lambda: state.kept)
        pruning = chooses | (count > budget.frozen_from)
        changed, current = flatten(updates), flatten(params)
        for path, kept in _flat(chosen).items():
            lam = (COLLECTION, *path, "lam")
            changed[lam] = jnp.where(pruning & ~kept, -current[lam], changed[lam])
        after = AdaLoRAState(
            inner=inner_state,
            count=count,
            importance=means.importance,
            uncertainty=means.uncertainty,
            kept=chosen,
            budget=allowed,
            places=state.places,
        )
        return unflatten(changed), after

    return optax.GradientTransformationExtraArgs(init, update)


def allocated(plan: Plan) -> list[Placement]:
    """The placements of ``plan`` whose ranks are still to be allotted."""
    return [p for p in plan.placements if isinstance(p.spec, AdaLoRA) and not p.spec.rank_pattern]


def budget_of(plan: Plan, *, target_total_rank: int | None = None, **schedule: int) -> Budget:
    """The budget of ``plan``'s triplets; ``schedule`` as in :func:`adalora`."""
    placements = allocated(plan)
    target = sum(p.spec.target_rank * sum(p.layers) for p in placements)
    return Budget(
        initial=sum(sum(ranks(placement)) for placement in placements),
        target=target if target_total_rank is None else target_total_rank,
        **schedule,
    )


def allocation_of(opt_state: PyTree) -> AdaLoRAState | None:
    """The state of :func:`adalora` within an optimizer's; None where there is none."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AdaLoRAState))
    return next((node for node in nodes if isinstance(node, AdaLoRAState)), None)


def scores_by_module(state: AdaLoRAState) -> dict[Path, Any]:
    """Scores of a concrete state's triplets by module, ``[*lead, 1, R]``, wherever it lives."""
    return triplet_scores(
        jax.tree.map(
            lambda i, u: np.asarray(i) * np.asarray(u), state.importance, state.uncertainty
        )
    )


def kept_by_module(state: AdaLoRAState) -> Flat:
    """Which triplets the last choice kept, by module, booleans ``[*lead, 1, R]``."""
    return _flat(state.kept)


def _check_whole(params: Any, real: Mapping[Path, np.ndarray]) -> None:
    """Raise where not every module is there as it was planned."""
    flat = flatten(params)
    for path, there in real.items():
        p, lam, q = (flat.get((COLLECTION, *path, name)) for name in ("p", "lam", "q"))
        if p is None or q is None or lam is None or lam.shape != there.shape:
            raise ConfigError(
                "optim.adalora chooses among all triplets at once, but was not given those of "
                f"'{'.'.join(path)}' as planned: put offload, masks and partitions inside it, not "
                "around it (its own state goes to the host with optim.adalora(..., offload=...))"
            )


def _best(
    scores: Flat, real: Mapping[Path, np.ndarray], budget: jax.Array, *, ties_are_pruned: bool
) -> Flat:
    """Booleans: the ``budget`` best of all real triplets, by one threshold for the whole model."""
    paths = list(real)
    flat = jnp.concatenate(
        [jnp.where(real[path], scores[path], -jnp.inf).ravel() for path in paths]
    )
    there = np.concatenate([real[path].ravel() for path in paths])
    if ties_are_pruned:
        # one more at the end, for a budget that keeps all
        descending = jnp.append(-jnp.sort(-flat), -jnp.inf)
        best = flat > descending[budget]
    else:
        order = jnp.argsort(-flat, stable=True)
        best = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) < budget)
    return _split(best & there, {path: real[path].shape for path in paths})


def _split(flat: jax.Array, shapes: Mapping[Path, Sequence[int]]) -> Flat:
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])[:-1].tolist()
    parts = jnp.split(flat, ends)
    return {path: part.reshape(shapes[path]) for path, part in zip(shapes, parts, strict=True)}


def _tree(flat: Flat) -> dict[str, Any]:
    return unflatten({(*path, "kept"): leaf for path, leaf in flat.items()})


def _flat(tree: PyTree) -> Flat:
    return {path[:-1]: leaf for path, leaf in flatten(tree).items()}
