"""The terms of the loss that the methods of a plan ask for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jqlora.methods import Plan, method_of
from jqlora.types import Adapters


def plan_penalty(plan: Plan) -> Callable[[Adapters], jax.Array]:
    """``penalty(adapters)``: the sum over the plan's sites, an fp32 scalar (0 for LoRA)."""

    def penalty(adapters: Adapters) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for placement in plan.placements:
            method = method_of(placement.spec)
            leaves = adapters[method.collection]
            for name in placement.site.path:
                leaves = leaves[name]
            total = total + method.penalty(leaves, placement)
        return total

    return penalty
