"""A step that is compiled while something else is done, such as reading the weights.

XLA takes one core and not Python's lock, and what it needs of a step's arguments are shapes, which
are known long before the arrays. What it makes goes where the jitted function keeps its programs:
a call finds it there and compiles nothing. A call with arguments of other shapes, on other devices
or in other memories than was foreseen finds nothing and compiles, as it would have without this;
so a wrong guess costs time and no more.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jqlora.types import PyTree


def compiled_ahead(step: Any, *shapes: PyTree) -> Callable[..., Any]:
    """The jitted ``step``, which a thread compiles from now on for arguments like ``shapes``
    (arrays or ``jax.ShapeDtypeStruct``).

    The first call waits for the thread, and raises what tracing or compiling raised there. An
    interpreter that ends earlier waits for it too: XLA cannot be interrupted.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile-ahead")
    compiling: Future | None = pool.submit(lambda: step.lower(*shapes).compile())
    pool.shutdown(wait=False)

    def call(*arguments: PyTree) -> Any:
        nonlocal compiling
        if compiling is not None:
            begun, compiling = compiling, None
            begun.result()
        return step(*arguments)

    return call
