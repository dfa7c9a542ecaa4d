"""One update of the adapters, compiled once.

Three decisions are worth knowing. The frozen base is an argument, neither differentiated nor closed
over: a closure would bake its gigabytes into the program as constants. The state is donated, so the
new adapters and moments take the place of the old ones. And the step is two parts, gradients and
update, of which only the first meets the base: :mod:`jqlora.train.together` shares that part among
several adapters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jqlora.optim.rounding import apply_updates
from jqlora.train.allocation import allocation_metrics, check_complete
from jqlora.train.gradients import Loss, Summed, summed_gradients
from jqlora.train.loss import Batch, causal_lm_loss
from jqlora.train.placement import PlacedStep
from jqlora.train.state import TrainState
from jqlora.tree import fold_in_path
from jqlora.types import Params

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    apply: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    loss: Loss = causal_lm_loss,
    device_bytes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Step:
    """A jitted ``step(state, params, batch) -> (state, metrics)`` that donates ``state``.

    ``apply`` is what ``jq.bind`` returned; what its plan's methods want minimized beside the loss,
    ``apply.penalty``, counts once per update and is reported apart. Leaves of ``batch`` have one
    leading batch axis, which ``accumulate`` must divide; the step cuts it into that many
    micro-batches and scans over them.
    ``loss(apply, variables, batch, key)`` returns a sum and the count to divide it by.

    ``metrics`` are fp32 scalars: ``loss`` (mean over the counted tokens), ``penalty``,
    ``grad_norm`` (before clipping) and ``tokens`` (how many were counted); with
    ``jq.optim.adalora`` also ``budget`` and ``rank``, int32. A batch that counts no token has loss
    zero and moves nothing but moments and decay.

    An optimizer with ``offload="auto"`` is placed at the first call, for ``device_bytes`` of memory
    (by default what the device has), and ``say`` (by default the log) is told what was decided.

    Dropout's keys are the state's key folded with the step and the micro-batch: a resumed run draws
    the same ones. Raises ``ConfigError`` at the first call when ``accumulate`` does not divide, or
    when what the adapters' method needs of ``apply`` or ``tx`` is missing.
    """

    def step(state: TrainState, params: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(state)
        frozen = {"params": params}
        found = summed_gradients(apply, loss, accumulate, state.adapters, frozen, batch, key)
        return update(apply, tx, state, found)

    jitted = jax.jit(step, donate_argnums=0)
    return PlacedStep(jitted, device_bytes=device_bytes, say=say)


def step_key(state: TrainState) -> jax.Array:
    """What a step draws its random numbers by."""
    return jax.random.fold_in(state.key, state.step)


def update(
    apply: Callable[..., Any],
    tx: optax.GradientTransformation,
    state: TrainState,
    found: Summed,
) -> tuple[TrainState, Metrics]:
    """The state one update on, and the metrics that :func:`make_train_step` names."""
    share = 1.0 / jnp.maximum(found.count, 1.0)
    gradients = jax.tree.map(lambda g: (_float32(g) * share).astype(g.dtype), found.gradients)
    extra = jnp.zeros((), jnp.float32)
    check_complete(apply, state)
    penalty = getattr(apply, "penalty", None)
    if penalty is not None:
        extra, more = jax.value_and_grad(penalty)(state.adapters)
        gradients = jax.tree.map(lambda g, m: g + m.astype(g.dtype), gradients, more)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
        updates, opt_state = tx.update(gradients, state.opt_state, state.adapters)
    metrics = {
        "loss": found.total * share,
        "penalty": extra,
        "grad_norm": optax.tree.norm(jax.tree.map(_float32, gradients)),
        "tokens": found.count,
    }
    rounding = fold_in_path(step_key(state), ("rounding",))
    adapters: Any = apply_updates(state.adapters, updates, rounding)
    metrics |= allocation_metrics(opt_state, adapters)
    return TrainState(state.step + 1, adapters, opt_state, state.key), metrics


def _float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32)
