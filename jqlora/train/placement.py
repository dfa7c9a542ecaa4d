"""Deciding, from the memory that the compiled step needs, which moments stay on the device.

The step is compiled for state that is all on the device. Where that fits, nothing moves. Where it
does not, the largest moments that leave room enough stay and the others go to the host, and the
step is compiled a second time. What a step needs is known to the compiler exactly, before anything
runs; the state's arrays are the unit because an array lives in one memory.
"""

import logging
from collections.abc import Callable
from typing import Any

import jax

from jqlora.optim.offload import DEVICE, HOST, on_host
from jqlora.optim.residence import bytes_a_device, decided, is_undecided
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

    def __call__(self, state: TrainState, *rest: Any) -> Any:
        if is_undecided(state.opt_state):
            limit = device_limit() if self._device_bytes is None else self._device_bytes
            state = place(self._jitted, state, *rest, limit=limit, say=self._say)
        return self._jitted(state, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def place(jitted: Any, state: TrainState, *rest: Any, limit: int | None, say: Say) -> TrainState:
    """``state`` with as much of the optimizer's on the device as ``limit`` bytes have room for.

    ``say`` hears what was decided. With ``limit=None`` all of it stays, as nothing is known.
    """
    away = [leaf for leaf in jax.tree.leaves(state.opt_state) if on_host(leaf)]
    total = sum(bytes_a_device(leaf) for leaf in away)
    state = _with(state, decided(state.opt_state))
    if limit is None:
        say("optimizer state stays on the device, which does not tell how much memory it has")
        return _moved(state, lambda leaf: True)
    held = sum(bytes_a_device(leaf) for leaf in jax.tree.leaves((state, rest)))
    if held <= limit:
        whole = _moved(state, lambda leaf: True)
        needed = compiled_bytes(jitted.lower(whole, *rest).compile())
        if needed <= limit:
            say(
                f"optimizer state stays on the device: the step needs {readable_bytes(needed)} of "
                f"{readable_bytes(limit)}"
            )
            return whole
        del whole
        needed -= total
    else:
        needed = compiled_bytes(jitted.lower(state, *rest).compile())
    kept, room = set(), limit - needed
    for leaf in sorted(away, key=bytes_a_device, reverse=True):
        if bytes_a_device(leaf) <= room:
            kept.add(id(leaf))
            room -= bytes_a_device(leaf)
    there = sum(bytes_a_device(leaf) for leaf in away if id(leaf) in kept)
    say(
        f"optimizer state: {readable_bytes(there)} on the device, {readable_bytes(total - there)} "
        f"in host memory; the step needs {readable_bytes(needed + there)} of "
        f"{readable_bytes(limit)}" + (", which does not fit" if room < 0 else "")
    )
    return _moved(state, lambda leaf: id(leaf) in kept)


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """What a compiled program needs on one device: arguments, results and all between them."""
    memory: Any = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def device_limit() -> int | None:
    """Bytes that the first device lets a program have; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def _moved(state: TrainState, stays: Callable[[Any], bool]) -> TrainState:
    def move(leaf: Any) -> Any:
        return jax.device_put(leaf, DEVICE if stays(leaf) else HOST) if on_host(leaf) else leaf

    return _with(state, jax.tree.map(move, state.opt_state))


def _with(state: TrainState, opt_state: PyTree) -> TrainState:
    return TrainState(state.step, state.adapters, opt_state, state.key)
