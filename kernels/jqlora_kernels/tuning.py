"""Where one kernel takes over from another, by device: ``tuning.json`` beside this file.

Its entries go by the beginning of the device's name; those with ``"measured": false`` are estimates
from counting instructions and bytes.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from jqlora_kernels.dispatch import device

FILE = Path(__file__).with_suffix(".json")
ANY = "any"


@dataclass(frozen=True)
class Tuning:
    """Up to ``vector_rows`` rows of ``x`` are multiplied without tensor cores, up to ``fused_rows``
    by tensor cores on tiles decoded in the kernel; more by a matrix decoded beforehand. The kernel
    for Hopper is used up to ``hopper_rows``."""

    vector_rows: int
    fused_rows: int
    hopper_rows: int
    measured: bool


@functools.cache
def table() -> dict[str, Tuning]:
    """The file's entries."""
    return {name: Tuning(**entry) for name, entry in json.loads(FILE.read_text()).items()}


def of_device(kind: str) -> Tuning:
    """The entry for a device of this kind (``jax.Device.device_kind``), or the one for any."""
    matches = [name for name in table() if kind.startswith(name)]
    return table()[max(matches, key=len, default=ANY)]


def here() -> Tuning:
    """The entry for the device that is traced for."""
    return of_device(device()[1])
