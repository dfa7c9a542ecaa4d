"""How often XLA compiled a function, by JAX's own log."""

import contextlib
import logging

import jax

STEP = "XLA compilation of jit(step)"
"""What JAX's log says whenever a step was compiled."""


@contextlib.contextmanager
def compilations(name="step"):
    """Yields a list that grows by one line at each compilation of the jitted function ``name``."""
    lines = []

    class Listener(logging.Handler):
        def emit(self, record):
            if f"XLA compilation of jit({name})" in record.getMessage():
                lines.append(record.getMessage())

    listener = Listener()
    logging.getLogger("jax").addHandler(listener)
    try:
        with jax.log_compiles():
            yield lines
    finally:
        logging.getLogger("jax").removeHandler(listener)
