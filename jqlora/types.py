"""Names for the shapes that the whole library passes around."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str, ...]
"""Where a leaf or module lives in nested dicts: ``("model", "layers", "mlp", "up_proj")``."""

PyTree: TypeAlias = Any
"""Any nesting of containers that JAX knows."""

Params: TypeAlias = Mapping[str, Any]
"""The frozen base: nested dicts whose leaves are arrays or ``QTensor``."""

Adapters: TypeAlias = Mapping[str, Any]
"""Trainable collections, ``{"lora": {...}, "full": {...}}``; each mirrors the module paths."""

Variables: TypeAlias = Mapping[str, Any]
"""``{"params": Params, **Adapters}``: everything a bound model is applied to."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called after each tensor with the number done, the number of all, and the tensor's name."""
