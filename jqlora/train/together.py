"""One step of several adapters on one base.

The base is read once: the gradients of all are taken by ``vmap`` over adapters that stand side by
side (:mod:`jqlora.stacking`), under which a product with the base becomes one product of more rows,
and a quantized matrix is decoded once. Everything else is each adapter's own, computed as in
:func:`~jqlora.train.make_train_step` on leaves of its own rank: optimizer, penalty, allocation of
ranks, rounding. So members may differ in all of these, moments of padding do not exist, and a
member is left with the state that a step of its own would have made, up to the order of fp32
additions within the products. The updates are unrolled: the program grows with the members by what
their optimizers take, the base's part of it does not.
"""

import operator
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jqlora.attach import Bound, bind
from jqlora.graft import CONSTANTS
from jqlora.stacking import common_plan, constants, crop, side_by_side
from jqlora.train.gradients import Loss, Summed, summed_gradients
from jqlora.train.loss import Batch, causal_lm_loss
from jqlora.train.placement import PlacedStep
from jqlora.train.state import TrainState
from jqlora.train.step import Metrics, step_key, update
from jqlora.types import Params


@flax.struct.dataclass
class Together:
    """States of adapters that are trained together, each as it would be alone."""

    members: tuple[TrainState, ...]

    @property
    def step(self) -> jax.Array:
        """Updates made, the same number for all; int32."""
        return self.members[0].step


JointStep = Callable[[Together, Params, Batch], tuple[Together, tuple[Metrics, ...]]]


def make_joint_step(
    applies: Sequence[Bound],
    optimizers: Sequence[optax.GradientTransformation],
    *,
    accumulate: int = 1,
    loss: Loss = causal_lm_loss,
    one_batch: bool = True,
    device_bytes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> JointStep:
    """A jitted ``step(state, params, batch) -> (state, metrics)`` that donates ``state``.

    ``applies`` are ``jq.bind`` of one model with each member's plan, ``optimizers`` one for each.
    What they leave open (``offload="auto"``) is decided for all at once, at the first call, with
    ``device_bytes`` and ``say`` as for ``make_train_step``. Where ``one_batch``, all members learn
    from the same batch, as for ``make_train_step``; else its leaves have the members on a first
    axis. ``metrics`` are those of ``make_train_step``, one mapping for each member.

    Raises :class:`~jqlora.errors.UnsupportedSite` for plans that do not stack.
    """
    plans = [apply.plan for apply in applies]
    shared = bind(applies[0].model, common_plan(plans))
    fixed = side_by_side([constants(plan) for plan in plans])

    def gradients(adapters, frozen, batch, key) -> Summed:
        return summed_gradients(shared, loss, accumulate, adapters, frozen, batch, key)

    every = jax.vmap(
        gradients, in_axes=(0, {"params": None, CONSTANTS: 0}, 0 if not one_batch else None, 0)
    )

    def step(state: Together, params: Params, batch: Batch):
        keys = jnp.stack([step_key(member) for member in state.members])
        adapters = side_by_side([member.adapters for member in state.members])
        found = every(adapters, {"params": params, CONSTANTS: fixed}, batch, keys)
        done = []
        for number, (apply, tx) in enumerate(zip(applies, optimizers, strict=True)):
            member = state.members[number]
            own = jax.tree.map(operator.itemgetter(number), found)
            own = own._replace(gradients=crop(own.gradients, member.adapters))
            done.append(update(apply, tx, member, own))
        states, metrics = zip(*done, strict=True)
        return Together(states), metrics

    jitted = jax.jit(step, donate_argnums=0)
    return PlacedStep(jitted, device_bytes=device_bytes, say=say)
