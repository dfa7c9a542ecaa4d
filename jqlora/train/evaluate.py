"""Held-out loss, exact over the tokens however they fall into batches; and scores of tasks."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jqlora.errors import DataError
from jqlora.train.loss import Batch, causal_lm_loss
from jqlora.types import Adapters, Params, Variables

Outputs = dict[str, jax.Array]
EvalStep = Callable[[Params, Adapters, Batch], tuple[jax.Array, jax.Array, Outputs]]
Score = Callable[[list[dict[str, np.ndarray]]], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean loss over ``tokens`` counted targets: cross-entropy in nats of tokens, or for a head
    with labels its loss over so many of them. ``metrics`` are a task's scores."""

    loss: float
    tokens: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def record(self) -> dict[str, Any]:
        """As JSON: with the metrics of a task, or else with the perplexity."""
        more = {"metrics": dict(self.metrics)} if self.metrics else {"perplexity": self.perplexity}
        return {"loss": self.loss, **more, "tokens": self.tokens}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Evaluation":
        """What :meth:`record` recorded."""
        metrics = record.get("metrics", {})
        return cls(loss=record["loss"], tokens=record["tokens"], metrics=metrics)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is evaluated: batches, and of a task how the outputs for all their rows are scored, or
    ``write(model, apply, variables)``, which generates and scores what was written."""

    batches: Sequence[Batch]
    score: Score | None = None
    write: Callable[[Any, Any, Variables], dict[str, float]] | None = None


def make_eval_step(
    apply: Callable[..., Any],
    *,
    loss: Callable[..., tuple[jax.Array, jax.Array]] = causal_lm_loss,
    outputs: Sequence[str] = (),
) -> EvalStep:
    """A jitted ``eval_step(params, adapters, batch) -> (sum of losses, count, outputs)`` without
    dropout; of what ``apply`` returns, ``outputs`` names what to return as well."""

    def eval_step(params: Params, adapters: Adapters, batch: Batch):
        variables = {"params": params, **adapters}
        if not outputs:
            return *loss(apply, variables, batch, None), {}
        seen: list[Any] = []

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(apply(*args, **kwargs))
            return seen[-1]

        total, count = loss(watched, variables, batch, None)
        return total, count, {name: getattr(seen[-1], name) for name in outputs}

    return jax.jit(eval_step)


def evaluate(
    eval_step: EvalStep,
    params: Params,
    adapters: Adapters,
    batches: Iterable[Batch],
    score: Score | None = None,
) -> Evaluation:
    """The loss over all ``batches``: sums of losses over sums of counts, both added in fp64; and
    what ``score`` makes of the outputs of all rows, in the batches' order.

    Raises DataError when nothing counts.
    """
    sums, rows = [], []
    for batch in batches:
        total, count, outputs = eval_step(params, adapters, batch)
        sums.append((total, count))
        if score is not None:
            arrays = {name: np.asarray(value) for name, value in outputs.items()}
            size = len(next(iter(batch.values())))
            rows += [{name: array[i] for name, array in arrays.items()} for i in range(size)]
    total = math.fsum(float(value) for value, _ in sums)
    tokens = math.fsum(float(count) for _, count in sums)
    if tokens == 0:
        raise DataError("the evaluation data hold no token to be predicted")
    metrics = {} if score is None else score(rows)
    return Evaluation(loss=total / tokens, tokens=round(tokens), metrics=metrics)
