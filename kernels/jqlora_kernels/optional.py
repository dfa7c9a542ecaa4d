"""Backends that need more than JAX alone, imported when they are first called."""

import importlib
from collections.abc import Callable
from typing import Any


def lazily(module: str, name: str, **options: Any) -> Callable[..., Any]:
    """``module.name`` with ``options``, imported at the first call.

    It raises ``NotImplementedError`` that names the missing package if the import fails.
    """

    def backend(*operands: Any) -> Any:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise NotImplementedError(f"{module} cannot be imported: {error}") from error
        return getattr(found, name)(*operands, **options)

    return backend
