"""The methods of fine-tuning, one row each."""

from typing import Any

from jqlora.methods import adalora, lora
from jqlora.methods.base import Method

METHODS: dict[type, Method] = {lora.LoRA: lora.METHOD, adalora.AdaLoRA: adalora.METHOD}
COLLECTIONS = frozenset(method.collection for method in METHODS.values())


def method_of(spec: Any) -> Method:
    """The row that serves a spec; raises ``TypeError`` for what is no spec."""
    method = METHODS.get(type(spec))
    if method is None:
        known = ", ".join(cls.__name__ for cls in METHODS)
        raise TypeError(f"{spec!r} is no adapter spec; known are {known}")
    return method
