"""What a training step carries to the next: everything that a checkpoint must hold."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jqlora.optim.offload import on_host
from jqlora.types import Adapters, PyTree


@flax.struct.dataclass
class TrainState:
    """Trainable collections, optimizer state, number of updates made (int32), and dropout's key.

    The frozen base is not part of it: it never changes, so it is an argument of the step.
    """

    step: jax.Array
    adapters: Adapters
    opt_state: PyTree
    key: jax.Array

    @classmethod
    def create(
        cls, adapters: Adapters, tx: optax.GradientTransformation, key: jax.Array
    ) -> "TrainState":
        """State before the first update.

        ``adapters`` and ``key`` are copied: the step donates its state, and the caller's own arrays
        should outlive that.
        """
        adapters = jax.tree.map(jnp.copy, adapters)
        state = cls(
            step=jnp.zeros((), jnp.int32),
            adapters=adapters,
            opt_state=tx.init(adapters),
            key=jnp.copy(key),
        )
        leaves = jax.tree.leaves(state)
        if isinstance(state.step, Tracer) or not any(map(on_host, leaves)):
            return state
        # what a step returns of arrays in two memories is bound to its device: begin so as well,
        # or the second step would compile again
        return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
