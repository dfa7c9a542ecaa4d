"""The command in a process of its own, with compiled programs shared between processes.

They run but briefly: optimizing them would cost more than it gained. torch is hidden, as where
jqlora is installed without it: transformers would import it for the tokenizer, which takes seconds.
"""

import os
import subprocess
import sys
from pathlib import Path

MODULE = (
    "import runpy, sys; sys.modules['torch'] = None; "
    "runpy.run_module('jqlora.cli', run_name='__main__', alter_sys=True)"
)


def start(*words: object, cache: Path, **more: str) -> subprocess.Popen:
    """``jqlora *words``, begun, with ``more`` in its environment; what it says on stderr can be
    read."""
    environment = (
        os.environ
        | more
        | {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    )
    return subprocess.Popen(
        [sys.executable, "-c", MODULE, *map(str, words)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
