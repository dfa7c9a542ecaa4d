"""What a run used: memory, and the versions of what computed it."""

import importlib.metadata
import platform
import resource
import sys

import jax

PACKAGES = ("jqlora", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


def host_peak_bytes() -> int:
    """The most memory that this process has held so far, in bytes (its resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes() -> int | None:
    """The most memory held on the first device, in bytes; None where the backend does not count.

    On a CPU the device's memory is the host's, and this is None.
    """
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def versions() -> dict[str, str]:
    """Versions of Python and the packages that a result depends on, and the device's kind."""
    found = {"python": platform.python_version(), "device": jax.local_devices()[0].device_kind}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def readable_bytes(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
