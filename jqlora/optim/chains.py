"""The usual optimizers as chains: clip, a direction, decoupled decay, the learning rate.

Only the direction differs from one to the next, and only it has a state worth storing in 8 bits or
off the device; both are wrappers around it. All else is stateless arithmetic that XLA fuses into
the update of the adapters.
"""

from typing import Literal, TypeAlias

import optax

from jqlora.optim.eight_bit import eight_bit
from jqlora.optim.offload import DEVICE, HOST, Offload, offload
from jqlora.optim.residence import marked
from jqlora.optim.rounding import in_float32, sixteen_bit
from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, PyTree

Bits: TypeAlias = Literal[8, 16, 32]
"""Of a stored moment."""
SPARED = frozenset({"bias", "scale", "lam"})
"""Leaves that weight decay leaves alone: biases, the gains of norms, and AdaLoRA's Λ, which would
otherwise be drawn to the zero that means pruned."""


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
    bits: Bits = 32,
    offload: Offload = "none",
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) after global-norm clipping.

    Moments are fp32, those of adapters in bfloat16 too (:mod:`~jqlora.optim.rounding`). The decay
    is ``learning_rate * weight_decay`` per update, on the leaves that :func:`decayed` names.
    ``max_grad_norm=None`` leaves gradients whole.

    ``bits=8`` stores the moments of larger leaves as bitsandbytes' AdamW8bit does
    (:func:`~jqlora.optim.eight_bit`), ``bits=16`` all of them in bfloat16. ``offload`` keeps them
    in the host's memory: ``"all"`` of them, or with ``"auto"`` those that the step's compiled
    memory leaves no room for on the device, decided at its first call
    (:func:`~jqlora.optim.offload`).

    >>> tx = adamw(cosine(2e-4, steps=1000, warmup=30), weight_decay=0.01)  # doctest: +SKIP
    """
    return _chain(
        optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps),
        learning_rate,
        weight_decay,
        max_grad_norm,
        bits,
        offload,
    )


def lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    bits: Bits = 32,
    offload: Offload = "none",
) -> optax.GradientTransformationExtraArgs:
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2): one moment, and updates of one size.

    Its authors advise a learning rate 3 to 10 times smaller than AdamW's. Other arguments are those
    of :func:`adamw`; signs know no norm, so gradients are not clipped by default.
    """
    return _chain(
        optax.scale_by_lion(b1=betas[0], b2=betas[1]),
        learning_rate,
        weight_decay,
        max_grad_norm,
        bits,
        offload,
    )


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    offload: Offload = "none",
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent, with momentum as torch has it (the sum of decayed gradients) where not 0.

    The decay is decoupled, as in :func:`adamw`.
    """
    direction = optax.trace(decay=momentum) if momentum else optax.identity()
    return _chain(direction, learning_rate, weight_decay, max_grad_norm, 32, offload)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) with a learning rate of its own.

    The second moment is kept as row and column means where both sides of a matrix have 128 entries;
    updates are clipped to a root mean square of 1 (section 5). Steps are not scaled by the size of
    a parameter (section 8): LoRA's second factor starts at zero and would stay there.
    """
    direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return _chain(direction, learning_rate, weight_decay, max_grad_norm, 32, "none")


def clipped(norm: float) -> optax.GradientTransformationExtraArgs:
    """Gradients scaled down to this global norm, which is taken in fp32."""
    return in_float32(optax.clip_by_global_norm(norm))


def _chain(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    max_grad_norm: float | None,
    bits: Bits,
    where: Offload,
) -> optax.GradientTransformationExtraArgs:
    direction = {8: eight_bit, 16: sixteen_bit, 32: in_float32}[bits](direction)
    if where != "none" or bits != 32:
        direction = offload(direction, home=DEVICE if where == "none" else HOST)
    links = [optax.identity() if max_grad_norm is None else clipped(max_grad_norm), direction]
    if weight_decay:
        links.append(in_float32(optax.add_decayed_weights(weight_decay, mask=decayed)))
    links.append(in_float32(optax.scale_by_learning_rate(learning_rate)))
    links.append(marked(open=where == "auto"))
    return optax.chain(*links)
