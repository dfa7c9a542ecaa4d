"""What a step keeps of its forward pass for its backward pass, told by tracing it.

Rematerialization and the gradient rules of quantized products decide that, not the device, so it
is known without one, and no product need be counted by hand.
"""

from collections.abc import Callable
from typing import Any

import jax

from jqlora.types import Adapters, Params


def residuals(
    apply: Callable[..., Any],
    loss: Callable[..., Any],
    adapters: Adapters,
    params: Params,
    batch: Any,
) -> list[Any]:
    """Shapes and dtypes of the arrays that the gradient of ``loss`` in the adapters keeps.

    Arguments may be abstract; what is handed on from them takes no room and is left out.
    """

    def forward(adapters: Adapters, params: Params, batch: Any) -> Any:
        def summed(adapters: Adapters) -> Any:
            return loss(apply, {"params": params, **adapters}, batch, None)

        return jax.vjp(summed, adapters, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(forward)(adapters, params, batch).jaxpr
    given = {_kind(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars)}
    found = {id(v): v.aval for v in jaxpr.outvars}
    return [aval for aval in found.values() if _kind(aval) not in given]


def _kind(aval: Any) -> Any:
    return aval.shape, aval.dtype
