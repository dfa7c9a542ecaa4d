"""AdaLoRA within the training step: that nothing of it is missing, and what it reports."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jqlora.errors import ConfigError
from jqlora.methods import METHODS, Plan
from jqlora.optim.adalora import COLLECTION, allocated, allocation_of
from jqlora.train.state import TrainState
from jqlora.tree import flatten
from jqlora.types import Adapters, PyTree


def check_complete(apply: Callable[..., Any], state: TrainState) -> None:
    """Raise :class:`ConfigError` where ``apply`` lost a method's penalty, as a function around what
    ``jq.bind`` returned does, or where the optimizer allots no ranks to a plan of AdaLoRA."""
    asking = {method.collection for method in METHODS.values() if method.penalty is not None}
    lost = sorted(asking & set(state.adapters))
    if lost and not hasattr(apply, "penalty"):
        raise ConfigError(
            f"apply lost the penalty that {', '.join(lost)} asks for: give make_train_step what "
            "jq.bind returned, not a function around it"
        )
    plan: Plan = getattr(apply, "plan", Plan(()))
    if allocated(plan) and allocation_of(state.opt_state) is None:
        raise ConfigError(
            "the plan has AdaLoRA, but the optimizer allots no ranks: wrap it as "
            "jq.optim.adalora(tx, plan, total_steps=..., initial_steps=..., final_steps=...)"
        )


def allocation_metrics(opt_state: PyTree, adapters: Adapters) -> dict[str, jax.Array]:
    """``budget``, the triplets allowed after this update, and ``rank``, those whose λ is not zero;
    both int32. The rank grows again between two choices. Empty without AdaLoRA's allocator."""
    allocation = allocation_of(opt_state)
    if allocation is None:
        return {}
    lams = [leaf for path, leaf in flatten(adapters[COLLECTION]).items() if path[-1] == "lam"]
    rank = sum((jnp.count_nonzero(lam) for lam in lams), jnp.zeros((), jnp.int32))
    return {"budget": allocation.budget, "rank": rank}
