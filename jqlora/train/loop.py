"""The loop around the step: order of events, and what happens when it is cut short.

At a step where several things are due they happen in this order: the step's numbers are checked and
logged, evaluations are made and logged, the log is synced to the disk, the checkpoint is written.
So every row up to a checkpoint's step is in the log before the checkpoint exists, and a run killed
at any moment resumes to the same rows. What is to be known of the model before training is measured
after the first step, which need not wait for it.

The loop keeps one step in flight: it hands the device step ``s + 1`` before it reads the loss of
step ``s``. A loss that is not finite is therefore seen one step late, but always before the next
checkpoint.

Several adapters may be trained by one step (:mod:`jqlora.train.together`): each is a
:class:`Trainee` with a log of its own, and a run of one has one.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
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
from jqlora.train.step import Metrics
from jqlora.types import Params


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
class Trainee:
    """One of the adapters that a step trains.

    ``lost(number, values, batch)`` hears of the step whose loss or gradient norm was NaN or
    infinite; where it does not raise, the others go on without this one.
    """

    log: MetricsLog
    schedule: optax.Schedule
    lost: Callable[[int, dict[str, float], Batch], None]
    name: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How training ended. ``signal`` names what stopped it early, None where it ran through."""

    state: Any
    signal: str | None
    compile_seconds: float
    train_seconds: float


def fit(
    state: Any,
    params: Params,
    *,
    step: Callable[[Any, Params, Batch], tuple[Any, Any]],
    batches: ResumableBatches,
    total_steps: int,
    every: Every,
    trainees: Sequence[Trainee],
    checkpoints: Checkpoints,
    progress: Progress,
    evaluate: Callable[[Any, int], Mapping[str, Evaluation]] | None = None,
    after_first: Callable[[], None] | None = None,
    seconds_before: float = 0.0,
) -> Fit:
    """Train from ``state.step`` to ``total_steps``; ``state`` is donated.

    ``step`` is that of ``make_train_step`` for a single trainee, else of ``make_joint_step``.
    ``seconds_before`` is the time that the steps made before took.

    A checkpoint is always made at the last step, and at the step in which SIGINT or SIGTERM came
    (a second SIGINT stops at once). ``evaluate(state, i)`` returns named evaluations of trainee i,
    each a row of its log. ``after_first()`` is called once in a whole run, however often it is
    resumed: when its first step is made and logged, before anything is evaluated or saved.

    Raises NonFiniteLoss when every trainee is lost, which leaves checkpoints as they were, and what
    their ``lost`` raises. Raises SaveError when the disk is full.
    """
    clock = Clock(seconds_before)
    pending: tuple[int, Batch, Metrics | tuple[Metrics, ...]] | None = None
    going = dict(enumerate(trainees))

    def settle() -> None:
        nonlocal pending
        if pending is None:
            return
        number, batch, metrics = pending
        pending = None
        of_all = metrics if isinstance(metrics, tuple) else (metrics,)
        rows: dict[int, Row] = {}
        for i, trainee in list(going.items()):
            values = {name: np.asarray(value).item() for name, value in of_all[i].items()}
            if not all(math.isfinite(value) for value in values.values()):
                trainee.lost(number, values, batch)
                del going[i]
                continue
            rows[i] = {"step": number, "kind": "train", **values, "tokens": int(values["tokens"])}
            with jax.numpy_dtype_promotion("standard"):
                rows[i]["learning_rate"] = float(jnp.asarray(trainee.schedule(number - 1)))
        if not going:
            raise NonFiniteLoss(f"at step {number} the last loss is no number: lower train.lr")
        rate = clock.step(_real_tokens(batch))
        for row in rows.values():
            row |= {"tokens_per_second": round(rate, 1), "seconds": round(clock.seconds, 3)}
        due = _due(number, every.log, total_steps)
        progress.step([*rows.values()], log=due)
        if due:
            for i, row in rows.items():
                going[i].log.write(row)

    with deferred_signals() as caught:
        for number in range(int(state.step) + 1, total_steps + 1):
            batch = next(batches)
            with clock.call(batch["input_ids"].shape):
                state, metrics = step(state, params, batch)
            settle()
            pending = (number, batch, metrics)
            if after_first is not None and number == 1:
                settle()
                with clock.paused():
                    after_first()
            if evaluate is not None and _due(number, every.evaluate, total_steps):
                settle()
                with clock.paused():
                    for i, trainee in going.items():
                        log_evaluations(trainee, progress, number, evaluate(state, i))
            if _due(number, every.save, total_steps) or caught:
                settle()
                with clock.paused():
                    for trainee in trainees:
                        trainee.log.sync()
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
    trainee: Trainee, progress: Progress, number: int, found: Mapping[str, Evaluation]
) -> None:
    """One row and one line for each evaluation made after ``number`` steps."""
    of = f"{trainee.name}: " if trainee.name else ""
    for name, result in found.items():
        scores = dict(result.metrics)
        row: Row = {"step": number, "kind": name, "loss": result.loss, "tokens": result.tokens}
        trainee.log.write(row | ({"metrics": scores} if scores else {}))
        told = scores or {"perplexity": result.perplexity}
        numbers = ", ".join(f"{what} {value:.4g}" for what, value in told.items())
        progress.say(f"step {number}: {of}{name} loss {result.loss:.4f}, {numbers}")


def _real_tokens(batch: Batch) -> int:
    """Tokens that are no padding, of a batch [B, T], or on average of one of several [n, B, T]."""
    mask = np.asarray(batch["segment_ids"] if "segment_ids" in batch else batch["attention_mask"])
    return int((mask > 0).sum()) // (len(mask) if mask.ndim == 3 else 1)


def _due(number: int, every: int, total: int) -> bool:
    return number == total or (every > 0 and number % every == 0)


def stop_at(path: Path, number: int, values: dict[str, float], batch: Batch) -> None:
    """Save the batch to ``path`` (npz) and raise NonFiniteLoss: how a run of one is lost."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in batch.items()}
    np.savez(buffer, step=np.int64(number), **arrays)
    atomic_write_bytes(path, buffer.getvalue())
    raise NonFiniteLoss(
        f"step {number} gave loss {values['loss']} and gradient norm {values['grad_norm']}; its "
        f"batch is in {path}. Checkpoints are untouched: lower train.lr, or look at the batch"
    )
