"""Choosing a backend: by platform unless told otherwise, and never silently.

A backend that cannot serve a shape or dtype raises ``NotImplementedError`` with the limit it met.
The next one in the platform's order is then tried, and the refusal is logged at debug level. A
backend that was asked for by name is the only one tried: its refusal is the caller's answer.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax

logger = logging.getLogger(__name__)

VARIABLE = "JQLORA_KERNELS"
ORDER = {"gpu": ("triton", "reference"), "cuda": ("triton", "reference")}

Result = TypeVar("Result")


def run(
    operation: str, backends: Mapping[str, Callable[[], Result]], requested: str | None
) -> Result:
    """Calls the first backend that does not refuse and returns its result.

    ``requested`` (an argument) goes before the environment variable ``JQLORA_KERNELS``, which goes
    before the platform's own order; all are read when a function is traced. Raises ``ValueError``
    for an unknown name, the refusal of a backend asked for by name, and an ``ExceptionGroup`` of
    all refusals when none serves.
    """
    source = "backend="
    if requested is None:
        source, requested = f"{VARIABLE}=", os.environ.get(VARIABLE) or None
    if requested is not None:
        if requested not in backends:
            raise ValueError(
                f"{source}{requested} is no backend of {operation}; it has {', '.join(backends)}"
            )
        return backends[requested]()
    refusals = []
    for name in ORDER.get(jax.default_backend(), ("reference",)):
        if name not in backends:
            continue
        try:
            return backends[name]()
        except NotImplementedError as refusal:
            logger.debug("%s: backend %s refused: %s", operation, name, refusal)
            refusals.append(refusal)
    raise ExceptionGroup(f"no backend of {operation} serves these operands", refusals)
