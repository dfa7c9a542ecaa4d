"""Where an optimizer's state lives: reading it, changing it, and leaving the choice open."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jqlora.optim.offload import HOST, on_host
from jqlora.types import PyTree


class Undecided(NamedTuple):
    """Marks an optimizer state of which nobody has decided yet what stays on the device."""


class Decided(NamedTuple):
    """What :class:`Undecided` becomes."""


@dataclasses.dataclass(frozen=True)
class Residence:
    """Bytes of an optimizer state by the memory that they live in, all devices together."""

    device: int
    host: int


def mark(*, open: bool) -> PyTree:
    """What a state carries to say whether the training step is to place it at its first call.

    It is there in either case: the tree of a checkpoint must not depend on where arrays lived.
    """
    return Undecided() if open else Decided()


def marked(*, open: bool) -> optax.GradientTransformationExtraArgs:
    """A link of a chain with nothing but a :func:`mark` of it; updates nothing."""
    return optax.GradientTransformationExtraArgs(
        lambda params: mark(open=open),
        lambda updates, state, params=None, **extra: (updates, state),
    )


def is_undecided(state: PyTree) -> bool:
    """Whether any part of ``state`` is :class:`Undecided`."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Undecided))
    return any(isinstance(node, Undecided) for node in nodes)


def decided(state: PyTree) -> PyTree:
    """``state`` with nothing left open."""
    return jax.tree.map(
        lambda node: Decided() if isinstance(node, Undecided) else node,
        state,
        is_leaf=lambda node: isinstance(node, Undecided),
    )


def residence(state: PyTree) -> Residence:
    """How much of a state (concrete arrays) lives where."""
    sizes = {True: 0, False: 0}
    for leaf in jax.tree.leaves(state):
        sizes[on_host(leaf)] += leaf.nbytes
    return Residence(device=sizes[False], host=sizes[True])


def planned(function: Callable[..., PyTree], *arguments: PyTree) -> tuple[PyTree, PyTree]:
    """What ``function(*arguments)`` will return, as shapes, and which of it will live on the host.

    The second is a tree of booleans like the first. Nothing is computed; ``arguments`` may be
    shapes as well.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    homes = [getattr(aval, "memory_space", None) == HOST for aval in jaxpr.out_avals]
    return shapes, jax.tree.unflatten(jax.tree.structure(shapes), homes)


def planned_residence(shapes: PyTree, away: PyTree) -> Residence:
    """How many bytes of what :func:`planned` returned will live where."""
    sizes = {True: 0, False: 0}
    for leaf, host in zip(*map(jax.tree.leaves, (shapes, away)), strict=True):
        sizes[host] += leaf.size * leaf.dtype.itemsize
    return Residence(device=sizes[False], host=sizes[True])


def bytes_a_device(leaf: Any) -> int:
    """What one device's share of an array takes; all of it where it is no array of JAX's yet."""
    return leaf.addressable_shards[0].data.nbytes if isinstance(leaf, jax.Array) else leaf.nbytes
