"""Held-out loss, exact over the tokens however they fall into batches."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jqlora.errors import DataError
from jqlora.train.loss import Batch, causal_lm_loss
from jqlora.types import Adapters, Params

EvalStep = Callable[[Params, Adapters, Batch], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean cross-entropy in nats per token over ``tokens`` counted tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def make_eval_step(
    apply: Callable[..., Any],
    *,
    loss: Callable[..., tuple[jax.Array, jax.Array]] = causal_lm_loss,
) -> EvalStep:
    """A jitted ``eval_step(params, adapters, batch) -> (sum of losses, count)``; no dropout."""

    def eval_step(params: Params, adapters: Adapters, batch: Batch):
        return loss(apply, {"params": params, **adapters}, batch, None)

    return jax.jit(eval_step)


def evaluate(
    eval_step: EvalStep, params: Params, adapters: Adapters, batches: Iterable[Batch]
) -> Evaluation:
    """The loss over all ``batches``: sums of losses over sums of tokens, both added in fp64.

    Raises DataError when no token counts.
    """
    sums = [eval_step(params, adapters, batch) for batch in batches]
    total = math.fsum(float(value) for value, _ in sums)
    tokens = sum(int(count) for _, count in sums)
    if tokens == 0:
        raise DataError("the evaluation data hold no token to be predicted")
    return Evaluation(loss=total / tokens, tokens=tokens)
