"""Deciding, from the memory that the compiled step needs, which moments stay on the device.

The step is compiled for state that is all on the device. Where that fits, nothing moves. Where it
does not, the largest moments that leave room enough stay and the others go to the host; the step is
compiled so, and where pages on their way take more room than was left, more goes. What a step needs
is known to the compiler exactly, before anything runs.

Whole arrays move, since an array lives in one memory: to cut one in two would tie the tree of a
checkpoint to the device that wrote it. A model of scanned layers has an array for each projection,
factor and moment (28 for AdamW on a Llama, the smallest 3 % of the state), so that no more than the
smallest is moved in vain.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jqlora.optim.offload import DEVICE, on_host
from jqlora.optim.residence import bytes_a_device, decided, is_undecided, planned
from jqlora.train.state import TrainState
from jqlora.train.usage import readable_bytes
from jqlora.types import PyTree

Say = Callable[[str], None]
log = logging.getLogger(__name__)


class PlacedStep:
    """A jitted step that places what an optimizer left open (``offload="auto"``) when it is called.

    Everything else of it is the jitted function's own.
    """

    def __init__(self, jitted: Any, *, device_bytes: int | None, say: Say | None):
        self._jitted = jitted
        self._device_bytes = device_bytes
        self._say = log.info if say is None else say

    def __call__(self, state: PyTree, *rest: Any) -> Any:
        if is_undecided(state):
            limit = device_limit() if self._device_bytes is None else self._device_bytes
            state = place(self._jitted, state, *rest, limit=limit, say=self._say)
        return self._jitted(state, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def place(jitted: Any, state: PyTree, *rest: Any, limit: int | None, say: Say) -> Any:
    """``state``, of one adapter or of several, with as much of the optimizers' on the device as
    ``limit`` bytes have room for.

    ``say`` hears what was decided. With ``limit=None`` all of it stays, as nothing is known.
    """
    away = [leaf for leaf in jax.tree.leaves(state) if on_host(leaf)]
    total = sum(bytes_a_device(leaf) for leaf in away)
    state = decided(state)
    if limit is None:
        say("optimizer state: stays on the device, which does not tell how much memory it has")
        return _moved(state, {id(leaf) for leaf in away})
    others = sum(bytes_a_device(leaf) for leaf in jax.tree.leaves((state, rest))) - total
    room = min(total, limit - others)
    while True:
        kept = largest(away, room)
        there = sum(bytes_a_device(leaf) for leaf in kept)
        placed = _moved(state, {id(leaf) for leaf in kept})
        program = jitted.lower(placed, *rest).compile()
        needed = compiled_bytes(program, host_bytes=total - there)
        if needed <= limit or not kept:
            break
        room = there - (needed - limit)
        del placed
    say(
        f"optimizer state: {_where(there, total)}; the step needs {readable_bytes(needed)} of "
        f"{readable_bytes(limit)}" + (", which does not fit" if needed > limit else "")
    )
    return placed


def largest(leaves: Sequence[Any], room: int) -> list[Any]:
    """The largest arrays that have room together, each taken if it still fits."""
    taken = []
    for leaf in sorted(leaves, key=bytes_a_device, reverse=True):
        if bytes_a_device(leaf) <= room:
            taken.append(leaf)
            room -= bytes_a_device(leaf)
    return taken


def lower_on(
    mesh: jax.sharding.Mesh, step: Any, create: Callable[[], TrainState], *rest: PyTree
) -> jax.stages.Lowered:
    """``step`` lowered for the devices of ``mesh``, which need not be there, with a copy of
    everything on each.

    ``create()`` would make the state; it is not called but traced, and what it puts on the host is
    there in the program as well. ``rest`` are the step's other arguments as shapes.
    """
    device = jax.NamedSharding(mesh, jax.P())
    # a mesh of absent devices forgets memory kinds, an abstract one keeps them
    host = jax.NamedSharding(mesh.abstract_mesh, jax.P(), memory_kind="pinned_host")

    def placed(leaf: Any, away: bool = False) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host if away else device)

    state = jax.tree.map(placed, *planned(create))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(state, *jax.tree.map(placed, rest))


def compiled_bytes(compiled: jax.stages.Compiled, *, host_bytes: int = 0) -> int:
    """What a compiled program needs on one device: arguments, results and all between them.

    ``host_bytes`` is how much of its arguments lives in host memory, all of it updated in place.
    XLA counts that apart, but not for CPUs, where it is subtracted.
    """
    memory: Any = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return total if memory.host_argument_size_in_bytes else total - host_bytes


def device_limit() -> int | None:
    """Bytes that the first device lets a program have; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def _where(there: int, total: int) -> str:
    if there == total:
        return "stays on the device"
    away = f"{readable_bytes(total - there)} in host memory"
    return f"{readable_bytes(there)} on the device, {away}" if there else away


def _moved(state: PyTree, staying: set[int]) -> PyTree:
    """The arrays with these ids on the device; all else where it is."""

    def move(leaf: Any) -> Any:
        return jax.device_put(leaf, DEVICE) if id(leaf) in staying else leaf

    return jax.tree.map(move, state)
