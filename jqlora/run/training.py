"""A run from its config to its report; started afresh or gone on with.

Everything that can be refused is refused first (the place, the data, the model's files, the plan),
before anything is deleted or a byte of weights is read. Whatever is random follows from
``train.seed``, so that a resumed run rebuilds the same start and only reads the rest from its
checkpoint.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax

from jqlora.attach import bind, init
from jqlora.compacting import as_lora, compact
from jqlora.config import AdaLoRAConfig, RunConfig, dump_config, read_config
from jqlora.errors import RunError
from jqlora.io.atomic import atomic_write_json, atomic_write_text
from jqlora.io.peft import save_adapter
from jqlora.methods import Plan
from jqlora.run import choices
from jqlora.run.session import Prepared, Say, Session, measure_all, open_session, prepare
from jqlora.run.summary import summarize
from jqlora.train.checkpoint import Checkpoints
from jqlora.train.directory import RunDirectory
from jqlora.train.evaluate import Evaluation
from jqlora.train.loop import Every, Fit, Trainee, fit, log_evaluations, stop_at
from jqlora.train.metrics import MetricsLog, read_metrics
from jqlora.train.progress import Progress
from jqlora.train.ranks import rank_record
from jqlora.train.report import write_report
from jqlora.train.state import TrainState
from jqlora.train.step import make_train_step
from jqlora.train.task_loss import loss_for
from jqlora.types import Adapters


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where the run is, and the signal that stopped it early (None where it is complete)."""

    directory: Path
    signal: str | None
    summary: dict[str, Any] | None


def say_on_stderr(text: str) -> None:
    """How a run speaks by default."""
    print(text, file=sys.stderr, flush=True)


def train(config: RunConfig, *, say: Say = say_on_stderr) -> Outcome:
    """Fine-tune as ``config`` says, into its output directory.

    Raises JqloraError of the fitting kind for anything a user can mend; see :func:`fit` for what
    interruptions do.
    """
    config = choices.with_absolute_paths(config)
    run = RunDirectory(config.output.directory)
    run.check(overwrite=config.output.overwrite)
    with run.locked():
        prepared = prepare(config, say)
        run.clear()
        atomic_write_text(run.config, dump_config(config))
        return _train(config, run, prepared, say)


def resume(directory: str | Path, *, say: Say = say_on_stderr) -> Outcome:
    """Go on with an interrupted run from its last sound checkpoint, bit for bit.

    Raises RunError where there is no run, or where it is complete.
    """
    run = RunDirectory(Path(directory).absolute())
    if not run.config.exists():
        raise RunError(f"{run.path} holds no run (no config.yaml): start one with 'jqlora train'")
    if run.summary.exists():
        raise RunError(f"the run in {run.path} is complete: see {run.report}")
    config = read_config([run.config])
    moved = dataclasses.replace(config.output, directory=str(run.path))
    config = dataclasses.replace(config, output=moved)
    with run.locked():
        return _train(config, run, prepare(config, say), say)


def _train(config: RunConfig, run: RunDirectory, prepared: Prepared, say: Say) -> Outcome:
    session = open_session(config, run, prepared, say)
    data, apply = prepared.data, bind(session.model, session.plan)
    total = data.loader.total_steps
    adapter_key, state_key = jax.random.split(jax.random.key(config.train.seed))
    tx = choices.optimizer_of(config, session.plan, total)
    state = TrainState.create(
        init(adapter_key, session.plan, session.params, dtype=config.method.dtype), tx, state_key
    )
    checkpoints = Checkpoints(run.checkpoints, keep=config.train.keep, say=say)
    checkpoints.clean()
    restored = checkpoints.restore_latest(state)
    if restored is not None:
        state, position = restored
        data.loader.set_state(position)
        say(f"going on from step {int(state.step)} of {total}")
    done = int(state.step)

    trainee = Trainee(
        log=MetricsLog(run.metrics, through=done if restored is not None else None),
        schedule=choices.schedule(config.train, total),
        lost=functools.partial(stop_at, run.bad_batch),
    )
    progress = Progress(total, done=done)
    try:
        if restored is None:
            _measure_before(session, state.adapters, trainee, progress)
        say("compiling the training step")
        result = fit(
            state,
            session.params,
            step=make_train_step(
                apply,
                tx,
                accumulate=config.train.accumulate,
                loss=loss_for(session.model),
                say=progress.say,
            ),
            batches=data.loader,
            total_steps=total,
            every=Every(
                log=config.train.log_every,
                evaluate=config.train.eval_every,
                save=config.train.save_every,
            ),
            trainees=[trainee],
            checkpoints=checkpoints,
            progress=progress,
            evaluate=lambda state, _: session.measure(state.adapters),
            seconds_before=_seconds_so_far(run),
        )
    finally:
        progress.close()
        trainee.log.close()
    if result.signal is not None:
        return Outcome(run.path, result.signal, None)
    return _finish(session, result, say)


def _measure_before(
    session: Session, adapters: Adapters, trainee: Trainee, progress: Progress
) -> None:
    """Losses and answers of the untrained model; measured once, however often a run is resumed."""
    known = session.run.read_before_after()
    if "before" not in known:
        progress.say("measuring the model before training")
        known = {"before": measure_all(session, adapters)}
        atomic_write_json(session.run.before_after, known)
    evaluations = {
        name: Evaluation.of(found) for name, found in known["before"]["evaluations"].items()
    }
    log_evaluations(trainee, progress, 0, evaluations)


def _finish(session: Session, result: Fit, say: Say) -> Outcome:
    run, adapters = session.run, result.state.adapters
    say("measuring the model after training")
    found = run.read_before_after() | {"after": measure_all(session, adapters)}
    atomic_write_json(run.before_after, found)
    ranks = rank_record(session.plan, result.state.opt_state)
    if ranks is not None:
        atomic_write_json(run.ranks, ranks)
    save_adapter(
        run.adapter,
        *_result(session, adapters),
        model=session.model,
        base_model_name=session.config.model.source,
    )
    summary = summarize(
        session.config,
        run,
        plan=session.plan,
        params=session.params,
        fit=result,
        load_seconds=session.load_seconds,
    )
    write_report(run, summary)
    atomic_write_json(run.summary, summary)
    return Outcome(run.path, None, summary)


def _result(session: Session, adapters: Adapters) -> tuple[Plan, Adapters]:
    """What is saved: AdaLoRA without its pruned triplets, in the format that the config names."""
    method = session.config.method
    if not isinstance(method, AdaLoRAConfig):
        return session.plan, adapters
    keep = as_lora if method.save_as == "lora" else compact
    return keep(session.plan, adapters)


def _seconds_so_far(run: RunDirectory) -> float:
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "train"]
    return rows[-1]["seconds"] if rows else 0.0
