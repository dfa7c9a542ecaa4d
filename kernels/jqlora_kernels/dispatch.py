"""Choosing a backend: by platform unless told otherwise, and never silently.

A backend that cannot serve a shape or dtype raises ``NotImplementedError`` with the limit it met,
while it is traced. The next one in the platform's order is then tried; the choice and the refusals
before it are logged at debug level. A backend that was asked for by name is the only one tried: its
refusal is the caller's answer.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

logger = logging.getLogger(__name__)

VARIABLE = "JQLORA_KERNELS"
ORDER = {"gpu": ("triton", "reference"), "cuda": ("triton", "reference")}


class Choice(NamedTuple):
    """The backend that serves, and why those before it do not."""

    backend: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        reasons = "".join(f"; {name} refused: {why}" for name, why in self.refusals.items())
        return f"{self.backend}{reasons}"


def device() -> tuple[str, str]:
    """Platform and kind of the device that is traced for: one named beforehand by an abstract mesh,
    which need not be there, or else this process's first."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None:
        return named.platform, named.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def run(
    operation: str, backends: Mapping[str, Callable[..., Any]], requested: str | None, *operands
) -> Any:
    """Calls the first backend that does not refuse ``operands`` and returns its result.

    ``requested`` (an argument) goes before the environment variable ``JQLORA_KERNELS``, which goes
    before the platform's own order; all are read when a function is traced. Raises ``ValueError``
    for an unknown name, the refusal of a backend asked for by name, and an ``ExceptionGroup`` of
    all refusals when none serves.
    """
    choice, result = attempt(operation, backends, requested, *operands)
    logger.debug("%s: backend %s", operation, choice)
    return result


def choose(
    operation: str, backends: Mapping[str, Callable[..., Any]], requested: str | None, *operands
) -> Choice:
    """The backend that ``run`` would call, found by tracing alone; operands may be abstract.

    Raises what ``run`` raises.
    """
    found = []

    def traced(*operands: Any) -> Any:
        choice, result = attempt(operation, backends, requested, *operands)
        found.append(choice)
        return result

    jax.eval_shape(traced, *operands)
    return found[0]


def attempt(
    operation: str, backends: Mapping[str, Callable[..., Any]], requested: str | None, *operands
) -> tuple[Choice, Any]:
    """Which backend serves, and its result."""
    source = "backend="
    if requested is None:
        source, requested = f"{VARIABLE}=", os.environ.get(VARIABLE) or None
    if requested is not None:
        if requested not in backends:
            raise ValueError(
                f"{source}{requested} is no backend of {operation}; it has {', '.join(backends)}"
            )
        return Choice(requested, {}), backends[requested](*operands)
    refusals: dict[str, NotImplementedError] = {}
    for name in ORDER.get(device()[0], ("reference",)):
        if name not in backends:
            continue
        try:
            result = backends[name](*operands)
        except NotImplementedError as refusal:
            refusals[name] = refusal
            continue
        return Choice(name, {n: str(refusal) for n, refusal in refusals.items()}), result
    raise ExceptionGroup(
        f"no backend of {operation} serves these operands", list(refusals.values())
    )
