"""Training as a run does it: from its last checkpoint, with its logs, in its directories."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import optax

from jqlora.attach import init
from jqlora.config import RunConfig
from jqlora.io.atomic import atomic_write_json
from jqlora.methods import Plan
from jqlora.optim.residence import planned
from jqlora.run import choices
from jqlora.run.session import Say, Session, measure_all
from jqlora.train.ahead import compiled_ahead
from jqlora.train.checkpoint import Checkpoints
from jqlora.train.directory import RunDirectory
from jqlora.train.evaluate import Evaluation
from jqlora.train.loop import Every, Fit, ResumableBatches, Trainee, fit, log_evaluations
from jqlora.train.metrics import MetricsLog, read_metrics
from jqlora.train.progress import Progress
from jqlora.train.state import TrainState
from jqlora.types import Adapters, Params


class Batches(ResumableBatches, Protocol):
    """What a loader is to a run."""

    total_steps: int

    def set_state(self, state: dict[str, Any]) -> None: ...


def carry_out(
    run: RunDirectory,
    sessions: Mapping[str, Session],
    state: Any,
    *,
    members: Callable[[Any], Sequence[TrainState]],
    step: Callable[..., Any],
    batches: Batches,
    lost: Callable[[str], Callable[..., None]],
    say: Say,
) -> Fit:
    """Train the adapters of all ``sessions``, which are named where there are several.

    Checkpoints of the whole ``state`` are in ``run``, logs and measurements in each session's own
    directory. ``members(state)`` are the sessions' own states; ``lost(name)`` is what becomes of
    one whose loss is no number (:class:`~jqlora.train.loop.Trainee`).
    """
    config, total = next(iter(sessions.values())).config, batches.total_steps
    checkpoints = Checkpoints(run.checkpoints, keep=config.train.keep, say=say)
    checkpoints.clean()
    restored = checkpoints.restore_latest(state)
    if restored is not None:
        state, position = restored
        batches.set_state(position)
        say(f"going on from step {int(state.step)} of {total}")
    done = int(state.step)

    several = [*sessions.values()]
    trainees = [
        Trainee(
            log=MetricsLog(session.run.metrics, through=done if restored is not None else None),
            schedule=jax.jit(choices.schedule(session.config.train, total)),
            lost=lost(name),
            name=name,
        )
        for name, session in sessions.items()
    ]
    progress = Progress(total, done=done)
    try:
        say("compiling the training step")
        return fit(
            state,
            several[0].base.params,
            step=step,
            batches=batches,
            total_steps=total,
            every=_every(config),
            trainees=trainees,
            checkpoints=checkpoints,
            progress=progress,
            evaluate=lambda state, i: several[i].instruments.evaluate(members(state)[i].adapters),
            after_first=lambda: _measure_untrained(several, trainees, progress),
            seconds_before=_seconds_so_far(several[0].run),
        )
    finally:
        progress.close()
        for trainee in trainees:
            trainee.log.close()


def first_state(
    config: RunConfig, plan: Plan, params: Params, tx: optax.GradientTransformation
) -> TrainState:
    """Before the first update; all that is random in it follows from the seed."""
    _, state_key = _keys(config)
    return TrainState.create(_first_adapters(config, plan, params), tx, state_key)


def compiled_for_first(
    run: RunDirectory,
    step: Any,
    create: Callable[[Params], Any],
    params: Params,
    batches: Batches,
) -> Callable[..., Any]:
    """``step``, compiled by a thread for the state that ``create`` will make of the base whose
    shapes are ``params``, or that ``run`` has a checkpoint of, and for the next of the batches.

    Where some of the state is made in host memory it is compiled when it is called: what is placed
    where depends on the arrays.
    """
    state, away = planned(create, params)
    if any(jax.tree.leaves(away)):
        return step
    if Checkpoints(run.checkpoints).steps():  # what is restored is bound to its device
        home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        state = jax.tree.map(lambda leaf: leaf.update(sharding=home), state)
    position = batches.get_state()
    batch = next(batches)
    batches.set_state(position)
    return compiled_ahead(step, state, params, batch)


def _first_adapters(config: RunConfig, plan: Plan, params: Params) -> Adapters:
    adapter_key, _ = _keys(config)
    return init(adapter_key, plan, params, dtype=config.method.dtype)


def _keys(config: RunConfig) -> jax.Array:
    return jax.random.split(jax.random.key(config.train.seed))


def _every(config: RunConfig) -> Every:
    train = config.train
    return Every(log=train.log_every, evaluate=train.eval_every, save=train.save_every)


def _measure_untrained(
    sessions: Sequence[Session], trainees: Sequence[Trainee], progress: Progress
) -> None:
    """Losses and answers from before training, by the adapters as they were first made; once for
    all sessions, as those change nothing yet, and however often a run is resumed."""
    before = None
    for session, trainee in zip(sessions, trainees, strict=True):
        before = session.run.read_before_after().get("before", before)
        if before is None:
            progress.say("measuring the model as it was before training")
            fresh = _first_adapters(session.config, session.plan, session.base.params)
            before = measure_all(session, fresh)
        atomic_write_json(session.run.before_after, {"before": before})
        evaluations = {name: Evaluation.of(found) for name, found in before["evaluations"].items()}
        log_evaluations(trainee, progress, 0, evaluations)


def _seconds_so_far(run: RunDirectory) -> float:
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "train"]
    return rows[-1]["seconds"] if rows else 0.0
