"""How long a call takes on a device, several contenders in turn.

Launching a kernel costs microseconds, which is more than a small one runs for: calls are therefore
repeated inside one compiled loop. A loop over one matrix would find it in the cache; each turn of
the loop therefore works through a list of them, together larger than any cache. Contenders take
turns round by round, so that a device that slows down slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CACHE = 128 * 2**20
"""Bytes of weights to work through before one is met again: more than twice an H100's cache."""
ROUND_SECONDS = 2e-3
BYTES_A_SECOND, OPERATIONS_A_SECOND = 3e12, 6e14  # for a first guess at a call's time
MOST_LAYERS, MOST_TURNS = 16, 100


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of some rounds, and the fastest and the slowest of them."""

    median: float
    least: float
    most: float
    rounds: int
    calls: int

    @staticmethod
    def of(seconds: Sequence[float], calls: int) -> "Timing":
        each = [s / calls for s in seconds]
        return Timing(statistics.median(each), min(each), max(each), len(each), calls)


@dataclass(frozen=True)
class Contender:
    """Something timed: ``run()`` makes ``calls`` calls and returns when they are done."""

    name: str
    run: Callable[[], Any]
    calls: int


def layers_for(bytes_each: int) -> int:
    """How many matrices of this size keep each other out of the cache."""
    return min(MOST_LAYERS, -(-CACHE // bytes_each))


def turns_for(bytes_moved: int, operations: int, layers: int) -> int:
    """How many times to work through ``layers`` for a round of ``ROUND_SECONDS``, by a guess."""
    guess = max(bytes_moved / BYTES_A_SECOND, operations / OPERATIONS_A_SECOND)
    return max(1, min(MOST_TURNS, int(ROUND_SECONDS / (guess * layers))))


def looped(
    name: str,
    call: Callable[[jax.Array, Any], Any],
    x: jax.Array,
    layers: Sequence[Any],
    turns: int,
) -> Contender:
    """``call(x, layer)`` over all ``layers``, ``turns`` times, in one compiled loop.

    All results are carried to the next turn and returned in the end, or the compiler would leave
    the calls out; the barrier keeps it from moving them out of the loop. Compiles and runs once,
    which is the warm-up.
    """

    def repeat(x: jax.Array, layers: Any) -> list[Any]:
        def turn(_: int, carried: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            x = lax.optimization_barrier(carried[0])
            return x, [call(x, layer) for layer in layers]

        shapes = jax.eval_shape(turn, 0, (x, None))[1]
        return lax.fori_loop(0, turns, turn, (x, [jnp.zeros(y.shape, y.dtype) for y in shapes]))[1]

    compiled = jax.jit(repeat).lower(x, list(layers)).compile()

    def run() -> None:
        jax.block_until_ready(compiled(x, list(layers)))

    run()
    return Contender(name, run, turns * len(layers))


def race(contenders: Sequence[Contender], rounds: int) -> dict[str, Timing]:
    """Every contender once a round."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            start = time.perf_counter()
            contender.run()
            seconds[contender.name].append(time.perf_counter() - start)
    return {c.name: Timing.of(seconds[c.name], c.calls) for c in contenders}
