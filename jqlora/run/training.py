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

from jqlora.attach import bind
from jqlora.compacting import as_lora, compact
from jqlora.config import AdaLoRAConfig, RunConfig, dump_config
from jqlora.io.atomic import atomic_write_json, atomic_write_text
from jqlora.io.peft import save_adapter
from jqlora.methods import Plan
from jqlora.run import choices
from jqlora.run.carrying import carry_out, compiled_for_first, first_state
from jqlora.run.session import Prepared, Say, Session, measure_all, open_session, prepare
from jqlora.run.summary import summarize
from jqlora.train.directory import RunDirectory
from jqlora.train.loop import Fit, stop_at
from jqlora.train.ranks import rank_record
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
        return train_in(config, run, prepared, say)


def train_in(config: RunConfig, run: RunDirectory, prepared: Prepared, say: Say) -> Outcome:
    """Train in a directory that is made and locked, from its last checkpoint if it has one."""
    sizes, loader = prepared.sizes, prepared.data.loader
    tx = choices.optimizer_of(config, sizes.plan, loader.total_steps)
    create = functools.partial(first_state, config, sizes.plan, tx=tx)
    step = make_train_step(
        bind(sizes.model, sizes.plan),
        tx,
        accumulate=config.train.accumulate,
        loss=loss_for(sizes.model),
        say=say,
    )
    step = compiled_for_first(run, step, create, sizes.params, loader)
    session = open_session(config, run, prepared, say)
    result = carry_out(
        run,
        {"": session},
        create(session.base.params),
        members=lambda state: (state,),
        step=step,
        batches=loader,
        lost=lambda _: functools.partial(stop_at, run.bad_batch),
        say=say,
    )
    if result.signal is not None:
        return Outcome(run.path, result.signal, None)
    say("measuring the model after training")
    after = measure_all(session, result.state.adapters)
    return Outcome(run.path, None, finish(session, result, after))


def finish(session: Session, result: Fit, after: dict[str, Any]) -> dict[str, Any]:
    """Save the adapter and write the report of a run that is through, measured ``after`` it;
    returns the summary."""
    from jqlora.train.report import write_report  # matplotlib keeps no first step waiting

    run, adapters = session.run, result.state.adapters
    atomic_write_json(run.before_after, run.read_before_after() | {"after": after})
    ranks = rank_record(session.plan, result.state.opt_state)
    if ranks is not None:
        atomic_write_json(run.ranks, ranks)
    save_adapter(
        run.adapter,
        *_result(session, adapters),
        model=session.base.model,
        base_model_name=session.config.model.source,
    )
    summary = summarize(
        session.config,
        run,
        plan=session.plan,
        params=session.base.params,
        fit=result,
        load_seconds=session.base.load_seconds,
    )
    write_report(run, summary)
    atomic_write_json(run.summary, summary)
    return summary


def _result(session: Session, adapters: Adapters) -> tuple[Plan, Adapters]:
    """What is saved: AdaLoRA without its pruned triplets, in the format that the config names."""
    method = session.config.method
    if not isinstance(method, AdaLoRAConfig):
        return session.plan, adapters
    keep = as_lora if method.save_as == "lora" else compact
    return keep(session.plan, adapters)
