"""Learning rates over the run, each with an optional linear warm-up from zero.

The shapes are those of transformers' ``get_*_schedule_with_warmup``, so that a recipe written for
one trains alike in the other: update ``t`` (counted from 0) uses ``peak * t / warmup`` during the
warm-up, hence the very first update of a warmed-up run moves nothing.
"""

from collections.abc import Callable

import optax


def constant(peak: float, *, steps: int | None = None, warmup: int = 0) -> optax.Schedule:
    """``peak`` at every update after the warm-up. ``steps`` is accepted so that all are alike."""
    del steps
    return _warmed_up(optax.constant_schedule(peak), peak, warmup)


def linear(peak: float, *, steps: int, warmup: int = 0) -> optax.Schedule:
    """From ``peak`` straight down to zero at update ``steps``."""
    return _warmed_up(optax.linear_schedule(peak, 0.0, steps - warmup), peak, warmup)


def cosine(peak: float, *, steps: int, warmup: int = 0, floor: float = 0.0) -> optax.Schedule:
    """Half a cosine from ``peak`` down to ``floor * peak`` at update ``steps``.

    Loshchilov and Hutter, "SGDR" (arXiv 1608.03983), eq. 5, one period.
    """
    return _warmed_up(optax.cosine_decay_schedule(peak, steps - warmup, floor), peak, warmup)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}
"""The schedules that a config may name."""


def _warmed_up(after: optax.Schedule, peak: float, warmup: int) -> optax.Schedule:
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
