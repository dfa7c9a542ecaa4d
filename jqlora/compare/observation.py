"""What is asked of either side, and what either side answers with: numpy arrays under PEFT's names.

Both sides run one after the other, never together, so that no more than one model is in memory.
"""

from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Recipe(NamedTuple):
    """How the adapters are trained on both sides: AdamW without clipping, ``steps`` updates, at
    the learning rate of the QLoRA paper.

    The betas are exact in fp32: optax takes 1 - β^t in fp32 and torch in fp64, which for the usual
    0.999 differ by 6e-5 at the first step, and that would be all that is seen. Decay leaves biases
    and norms alone, as ``jq.optim.adamw`` does.
    """

    steps: int = 60
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.875, 0.96875)
    eps: float = 1e-8
    weight_decay: float = 0.01


class Batch(NamedTuple):
    """One batch in the words of either side, int32 or fp32 arrays [B, ...].

    ``shown`` bool [B, T] are the input tokens that are no padding, ``answered`` those at which
    logits mean something; None where there is one answer a row. What stands elsewhere means nothing
    and is not compared.
    """

    ours: Arrays
    theirs: Arrays
    shown: np.ndarray
    answered: np.ndarray | None


class Observation(NamedTuple):
    """What a side computed; all arrays fp32.

    ``hidden`` maps "hidden_states", or "encoder_hidden_states" and "decoder_hidden_states", to a
    list of [tokens, D]; ``logits`` are [tokens, ...]; both are of the first batch, and so are
    ``gradients``, which have the adapters' names. ``losses`` has one entry a step, before its
    update. ``before`` and ``after`` are the adapters.
    """

    hidden: dict[str, list[np.ndarray]]
    logits: Arrays
    gradients: Arrays
    losses: list[float]
    before: Arrays
    after: Arrays


LOGITS = ("logits", "start_logits", "end_logits")
HIDDEN = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def seen_in(output: Any, batch: Batch, numpy: Any) -> tuple[dict[str, list[np.ndarray]], Arrays]:
    """``(hidden, logits)`` of either side's output; ``numpy`` makes an fp32 array of theirs."""
    hidden = {}
    for field in HIDDEN:
        states = getattr(output, field, None)
        if states is not None:
            of_decoder = field.startswith("decoder") and batch.answered is not None
            real = batch.answered if of_decoder else batch.shown
            hidden[field] = [numpy(state)[real] for state in states]
    logits = {}
    for field in LOGITS:
        found = getattr(output, field, None)
        if found is not None:
            logits[field] = numpy(found)
            if logits[field].ndim == 1:  # DeBERTa's regression drops the axis where it has labels
                logits[field] = logits[field][:, None]
            if batch.answered is not None:
                logits[field] = logits[field][batch.answered]
    return hidden, logits
