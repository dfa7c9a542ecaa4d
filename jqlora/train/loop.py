"""The loop around the step: order of events, and what happens when it is cut short.

At a step where several things are due they happen in this order: the step's numbers are checked and
logged, evaluations are made and logged, the log is synced to the disk, the checkpoint is written.
So every row up to a checkpoint's step is in the log before the checkpoint exists, and a run killed
at any moment resumes to the same rows.

The loop keeps one step in flight: it hands the device step ``s + 1`` before it reads the loss of
step ``s``. A loss that is not finite is therefore seen one step late, but always before the next
checkpoint.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jqlora.errors import NonFiniteLoss
from jqlora.io.atomic import atomic_write_bytes
from jqlora.train.checkpoint import Checkpoints
from jqlora.train.clock import Clock
from jqlora.train.evaluate import Evaluation
from jqlora.train.loss import Batch
from jqlora.train.metrics import MetricsLog, Row
from jqlora.train.progress import Progress
from jqlora.train.signals import deferred_signals
from jqlora.train.state import TrainState
from jqlora.train.step import Metrics, Step
from jqlora.types import Adapters, Params


class ResumableBatches(Protocol):
    """What the loop asks of a loader (``jq.data.make_loader`` returns one)."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every:
    """After how many steps something happens; 0 is never. The last step has all of them."""

    log: int = 1
    evaluate: int = 0
    save: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How training ended. ``signal`` names what stopped it early, None where it ran through."""

    state: TrainState
    signal: str | None
    compile_seconds: float
    train_seconds: float


def fit(
    state: TrainState,
    params: Params,
    *,
    step: Step,
    batches: ResumableBatches,
    total_steps: int,
    every: Every,
    schedule: optax.Schedule,
    checkpoints: Checkpoints,
    log: MetricsLog,
    progress: Progress,
    evaluate: Callable[[Adapters], Mapping[str, Evaluation]] | None = None,
    bad_batch: Path,
    seconds_before: float = 0.0,
) -> Fit:
    """Train from ``state.step`` to ``total_steps``; ``state`` is donated.

    ``seconds_before`` is the time that the steps made before took.

    A checkpoint is always made at the last step, and at the step in which SIGINT or SIGTERM came
    (a second SIGINT stops at once). ``evaluate(adapters)`` returns named evaluations, each a row of
    the log.

    Raises NonFiniteLoss when loss or gradient norm is NaN or infinite, after saving the batch to
    ``bad_batch`` (npz); checkpoints stay as they were. Raises SaveError when the disk is full.
    """
    clock = Clock(seconds_before)
    pending: tuple[int, Batch, Metrics] | None = None

    def settle() -> None:
        nonlocal pending
        if pending is None:
            return
        number, batch, metrics = pending
        pending = None
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        if not all(math.isfinite(value) for value in values.values()):
            _stop_at(number, values, batch, bad_batch)
        rate = clock.step(_real_tokens(batch))
        row: Row = {"step": number, "kind": "train", **values, "tokens": int(values["tokens"])}
        with jax.numpy_dtype_promotion("standard"):
            row["learning_rate"] = float(jnp.asarray(schedule(number - 1)))
        row |= {"tokens_per_second": round(rate, 1), "seconds": round(clock.seconds, 3)}
        due = _due(number, every.log, total_steps)
        progress.step(row, log=due)
        if due:
            log.write(row)

    with deferred_signals() as caught:
        for number in range(int(state.step) + 1, total_steps + 1):
            batch = next(batches)
            with clock.call(batch["input_ids"].shape):
                state, metrics = step(state, params, batch)
            settle()
            pending = (number, batch, metrics)
            if evaluate is not None and _due(number, every.evaluate, total_steps):
                settle()
                with clock.paused():
                    log_evaluations(log, progress, number, evaluate(state.adapters))
            if _due(number, every.save, total_steps) or caught:
                settle()
                with clock.paused():
                    log.sync()
                    checkpoints.save(state, batches.get_state())
            if caught:
                break
        settle()
    return Fit(
        state=state,
        signal=caught[0] if caught and int(state.step) < total_steps else None,
        compile_seconds=clock.compile_seconds,
        train_seconds=clock.seconds,
    )


def log_evaluations(
    log: MetricsLog, progress: Progress, number: int, found: Mapping[str, Evaluation]
) -> None:
    """One row and one line for each evaluation made after ``number`` steps."""
    for name, result in found.items():
        scores = dict(result.metrics)
        row: Row = {"step": number, "kind": name, "loss": result.loss, "tokens": result.tokens}
        log.write(row | ({"metrics": scores} if scores else {}))
        told = scores or {"perplexity": result.perplexity}
        numbers = ", ".join(f"{what} {value:.4g}" for what, value in told.items())
        progress.say(f"step {number}: {name} loss {result.loss:.4f}, {numbers}")


def _real_tokens(batch: Batch) -> int:
    """Tokens of a batch that are no padding."""
    mask = batch["segment_ids"] if "segment_ids" in batch else batch["attention_mask"]
    return int((np.asarray(mask) > 0).sum())


def _due(number: int, every: int, total: int) -> bool:
    return number == total or (every > 0 and number % every == 0)


def _stop_at(number: int, values: dict[str, float], batch: Batch, path: Path) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in batch.items()}
    np.savez(buffer, step=np.int64(number), **arrays)
    atomic_write_bytes(path, buffer.getvalue())
    raise NonFiniteLoss(
        f"step {number} gave loss {values['loss']} and gradient norm {values['grad_norm']}; its "
        f"batch is in {path}. Checkpoints are untouched: lower train.lr, or look at the batch"
    )
