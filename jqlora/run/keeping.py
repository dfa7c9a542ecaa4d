"""What is kept on the disk between runs, so that the next one starts sooner: codes and programs."""

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import jax

from jqlora.io import Cache

OFF = "off"
AUTO = "auto"
PROGRAMS = "programs"


def keep(setting: str, say: Callable[[str], None]) -> Cache | None:
    """The cache of 4-bit codes that ``setting`` means: ``auto`` ($JQLORA_CACHE, which may say
    ``off`` too, or ~/.cache/jqlora), a folder, or ``off``, which is None.

    Beside it the process keeps what XLA compiles from now on, unless JAX was told another place.
    """
    if setting == OFF or (setting == AUTO and os.environ.get("JQLORA_CACHE") == OFF):
        return None
    cache = Cache(say=say) if setting == AUTO else Cache(Path(setting).expanduser(), say)
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = cache.folder.absolute() / PROGRAMS / _machine()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # the many small ones take seconds together
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return cache


def _machine() -> str:
    """Tells processors apart: what was compiled for one may be illegal on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    features = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return hashlib.sha256("\n".join(sorted(features or lines)).encode()).hexdigest()[:16]
