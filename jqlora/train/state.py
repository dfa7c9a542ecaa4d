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
        if isinstance(state.step, Tracer):
            return state
        return _settled(state)


def _settled(state: TrainState) -> TrainState:
    """``state`` bound to its devices where a step will return it so: where arrays are in two
    memories, or sharded. Else the second step would compile again, or the first be refused because
    counts live on one device and adapters on several."""
    leaves = jax.tree.leaves(state)
    sharded = [leaf.sharding for leaf in leaves if isinstance(leaf.sharding, jax.NamedSharding)]
    if not sharded and not any(map(on_host, leaves)):
        return state

    def home(leaf: jax.Array) -> jax.sharding.Sharding:
        found = leaf.sharding
        if not sharded or isinstance(found, jax.NamedSharding):
            return found
        return jax.NamedSharding(sharded[0].mesh, jax.P(), memory_kind=found.memory_kind)

    return jax.device_put(state, jax.tree.map(home, state))
