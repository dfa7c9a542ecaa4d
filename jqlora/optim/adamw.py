"""AdamW as a chain: clip, Adam's direction, decoupled decay, learning rate."""

import optax

from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, PyTree

SPARED = frozenset({"bias", "scale"})
"""Leaves that weight decay leaves alone: biases and the gains of norms."""


def decayed(adapters: Adapters) -> PyTree:
    """A tree of booleans shaped like ``adapters``: True where weight decay applies.

    Leaves are told apart by name and not by rank, because a stack of biases is a matrix too.
    """
    return unflatten({path: path[-1] not in SPARED for path in flatten(adapters)})


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) after global-norm clipping.

    Moments have the dtype of the adapters (fp32). The decay is ``learning_rate * weight_decay`` per
    update, on the leaves that :func:`decayed` names. ``max_grad_norm=None`` leaves gradients whole.

    >>> tx = adamw(cosine(2e-4, steps=1000, warmup=30), weight_decay=0.01)  # doctest: +SKIP
    """
    links = []
    if max_grad_norm is not None:
        links.append(optax.clip_by_global_norm(max_grad_norm))
    links.append(optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps))
    if weight_decay:
        links.append(optax.add_decayed_weights(weight_decay, mask=decayed))
    links.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*links)
