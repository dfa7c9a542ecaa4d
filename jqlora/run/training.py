"""A run from its config to its report; started afresh or gone on with.

Everything that can be refused is refused first (the place, the data, the model's files, the plan),
before anything is deleted or a byte of weights is read. Whatever is random follows from
``train.seed``, so that a resumed run rebuilds the same start and only reads the rest from its
checkpoint.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from jqlora.attach import bind, init, plan
from jqlora.config import RunConfig, dump_config, read_config
from jqlora.errors import RunError
from jqlora.io import load, load_tokenizer
from jqlora.io.atomic import atomic_write_json, atomic_write_text
from jqlora.io.peft import save_adapter
from jqlora.methods import Plan
from jqlora.run import choices
from jqlora.run.answers import Answerer, check_answers
from jqlora.run.data import RunData, read_data
from jqlora.run.loading import LoadingBar
from jqlora.run.sizes import plan_run
from jqlora.run.summary import summarize
from jqlora.train.checkpoint import Checkpoints
from jqlora.train.directory import RunDirectory
from jqlora.train.evaluate import Evaluation, evaluate, make_eval_step
from jqlora.train.loop import Every, Fit, fit, log_evaluations
from jqlora.train.metrics import MetricsLog, read_metrics
from jqlora.train.penalty import plan_penalty
from jqlora.train.progress import Progress
from jqlora.train.report import write_report
from jqlora.train.state import TrainState
from jqlora.train.step import make_train_step
from jqlora.types import Adapters, Params

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where the run is, and the signal that stopped it early (None where it is complete)."""

    directory: Path
    signal: str | None
    summary: dict[str, Any] | None


def say_on_stderr(text: str) -> None:
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
        prepared = _prepare(config, say)
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
        return _train(config, run, _prepare(config, say), say)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    tokenizer: Any
    data: RunData


def _prepare(config: RunConfig, say: Say) -> _Prepared:
    """All that can fail early; only headers of the model's files are read."""
    sizes = plan_run(config)
    tokenizer = load_tokenizer(config.model.source)
    data = read_data(config, tokenizer)
    for line in (*sizes.lines(), *data.messages):
        say(line)
    return _Prepared(tokenizer, data)


@dataclasses.dataclass(frozen=True)
class _Session:
    """What stands in memory during a run."""

    config: RunConfig
    run: RunDirectory
    model: nn.Module
    params: Params
    plan: Plan
    data: RunData
    measure: Callable[[Adapters], dict[str, Evaluation]]
    answerer: Answerer
    load_seconds: float


def _train(config: RunConfig, run: RunDirectory, prepared: _Prepared, say: Say) -> Outcome:
    session = _open(config, run, prepared, say)
    data, apply = prepared.data, bind(session.model, session.plan)
    total = data.loader.total_steps
    adapter_key, state_key = jax.random.split(jax.random.key(config.train.seed))
    tx = choices.optimizer(config.train, total)
    state = TrainState.create(init(adapter_key, session.plan, session.params), tx, state_key)
    checkpoints = Checkpoints(run.checkpoints, keep=config.train.keep, say=say)
    checkpoints.clean()
    restored = checkpoints.restore_latest(state)
    if restored is not None:
        state, position = restored
        data.loader.set_state(position)
        say(f"going on from step {int(state.step)} of {total}")
    done = int(state.step)

    log = MetricsLog(run.metrics, through=done if restored is not None else None)
    progress = Progress(total, done=done)
    try:
        if restored is None:
            _measure_before(session, state.adapters, log, progress)
        say("compiling the training step")
        result = fit(
            state,
            session.params,
            step=make_train_step(
                apply, tx, accumulate=config.train.accumulate, penalty=plan_penalty(session.plan)
            ),
            batches=data.loader,
            total_steps=total,
            every=Every(
                log=config.train.log_every,
                evaluate=config.train.eval_every,
                save=config.train.save_every,
            ),
            schedule=choices.schedule(config.train, total),
            checkpoints=checkpoints,
            log=log,
            progress=progress,
            evaluate=session.measure,
            bad_batch=run.bad_batch,
            seconds_before=_seconds_so_far(run),
        )
    finally:
        progress.close()
        log.close()
    if result.signal is not None:
        return Outcome(run.path, result.signal, None)
    return _finish(session, result, say)


def _open(config: RunConfig, run: RunDirectory, prepared: _Prepared, say: Say) -> _Session:
    begin = time.perf_counter()
    with LoadingBar(config.model.source, say) as bar:
        model, params = load(
            config.model.source,
            quantize=choices.quantization(config.model.quantize),
            dtype=choices.compute_dtype(config.model),
            progress=bar,
        )
    seconds = time.perf_counter() - begin
    model = model.clone(remat=config.model.remat, attention=config.model.attention)
    planned = plan(model, params, choices.adapter_spec(config.method))
    apply = bind(model, planned)
    eval_step = make_eval_step(apply)

    def measure(adapters: Adapters) -> dict[str, Evaluation]:
        return {
            name: evaluate(eval_step, params, adapters, batches)
            for name, batches in prepared.data.evaluations.items()
        }

    answerer = Answerer(
        [*prepared.data.prompts, *prepared.data.checks],
        model=model,
        apply=apply,
        tokenizer=prepared.tokenizer,
        template=choices.template(config),
        max_new_tokens=config.sample.max_new_tokens,
    )
    return _Session(config, run, model, params, planned, prepared.data, measure, answerer, seconds)


def _measure_before(
    session: _Session, adapters: Adapters, log: MetricsLog, progress: Progress
) -> None:
    """Losses and answers of the untrained model; measured once, however often a run is resumed."""
    known = session.run.read_before_after()
    if "before" not in known:
        progress.say("measuring the model before training")
        known = {"before": _measured(session, adapters)}
        atomic_write_json(session.run.before_after, known)
    evaluations = {
        name: Evaluation(loss=found["loss"], tokens=found["tokens"])
        for name, found in known["before"]["evaluations"].items()
    }
    log_evaluations(log, progress, 0, evaluations)


def _measured(session: _Session, adapters: Adapters) -> dict[str, Any]:
    """``evaluations`` by name, ``answers`` to the prompts, and ``checks`` of general knowledge."""
    data, count = session.data, len(session.config.sample.prompts)
    texts = session.answerer.ask({"params": session.params, **adapters})
    return {
        "evaluations": {
            name: {"loss": e.loss, "perplexity": e.perplexity, "tokens": e.tokens}
            for name, e in session.measure(adapters).items()
        },
        "answers": [
            {"prompt": prompt, "answer": text}
            for prompt, text in zip(session.config.sample.prompts, texts[:count], strict=True)
        ],
        "checks": check_answers(data.checks, texts[count:]),
    }


def _finish(session: _Session, result: Fit, say: Say) -> Outcome:
    run, adapters = session.run, result.state.adapters
    say("measuring the model after training")
    measured = run.read_before_after() | {"after": _measured(session, adapters)}
    atomic_write_json(run.before_after, measured)
    save_adapter(
        run.adapter,
        session.plan,
        adapters,
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


def _seconds_so_far(run: RunDirectory) -> float:
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "train"]
    return rows[-1]["seconds"] if rows else 0.0
