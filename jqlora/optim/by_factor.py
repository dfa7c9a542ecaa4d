"""Different treatment of LoRA's two factors, for any optimizer: LoRA+ and LoRA-FA."""

from collections.abc import Hashable
from typing import Any

import optax

from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, PyTree


def lora_plus(
    inner: optax.GradientTransformation, ratio: float
) -> optax.GradientTransformationExtraArgs:
    """``inner`` with updates of LoRA's second factor ``b`` multiplied by ``ratio``.

    LoRA+ (Hayou et al., arXiv 2402.12354): the factor that starts at zero learns best with a rate
    some 16 times the other's. As learning rates multiply updates, decoupled decay included, this is
    a learning rate of ``ratio`` times the one of ``inner``.

    >>> tx = lora_plus(adamw(5e-5), ratio=16)  # doctest: +SKIP
    """
    rest = optax.identity()
    ratios: dict[Hashable, Any] = {"a": rest, "b": optax.scale(ratio), "other": rest}
    return optax.chain(inner, optax.partition(ratios, _factors))


def lora_fa(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner`` for all but LoRA's first factor ``a``, which stays as it started.

    LoRA-FA (Zhang et al., arXiv 2308.03303). A frozen factor has no optimizer state, and ``inner``
    does not see its gradient: a global norm is that of what is trained.

    >>> tx = lora_fa(adamw(2e-4))  # doctest: +SKIP
    """
    return optax.partition({"a": optax.set_to_zero(), "b": inner, "other": inner}, _factors)


def _factors(adapters: Adapters) -> PyTree:
    """A tree shaped like ``adapters``: ``a`` and ``b`` for LoRA's factors, ``other`` elsewhere."""
    return unflatten(
        {
            path: path[-1] if path[0] == "lora" and path[-1] in ("a", "b") else "other"
            for path in flatten(adapters)
        }
    )
