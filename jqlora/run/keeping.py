"""What is kept on the disk between runs, so that the next one starts sooner: codes and programs."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax

from jqlora import processor
from jqlora.io import Cache

OFF = "off"
AUTO = "auto"
PROGRAMS = "programs"
MOST = 2**29
"""Bytes of programs that are kept, those of all machines together."""


def keep(setting: str, say: Callable[[str], None]) -> Cache | None:
    """The cache of 4-bit codes that ``setting`` means: ``auto`` ($JQLORA_CACHE, which may say
    ``off`` too, or ~/.cache/jqlora), a folder, or ``off``, which is None.

    Beside it the process keeps what XLA compiles from now on, unless JAX was told another place;
    of what is there, no more than ``MOST``.
    """
    if setting == OFF or (setting == AUTO and os.environ.get("JQLORA_CACHE") == OFF):
        return None
    cache = Cache(say=say) if setting == AUTO else Cache(Path(setting).expanduser(), say)
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        programs = cache.folder.absolute() / PROGRAMS
        prune(programs)
        folder = programs / processor.fingerprint()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # the many small ones take seconds together
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return cache


def prune(folder: Path, most: int = MOST) -> None:
    """Delete the programs that were used longest ago, until no more than ``most`` bytes are left.

    JAX's own limit (``jax_compilation_cache_max_size``) reads the times of all programs whenever
    it keeps one: 0.2 s for each where there are 2,000, as a few runs leave. This looks once.
    When a program was used is the file's time of access, which most systems keep to the day.
    """
    found = []
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # another process may be at it too
            found.append((path.stat(), path))
    left = sum(stat.st_size for stat, _ in found)
    for stat, path in sorted(found, key=lambda item: item[0].st_atime):
        if left <= most:
            return
        path.unlink(missing_ok=True)
        left -= stat.st_size
