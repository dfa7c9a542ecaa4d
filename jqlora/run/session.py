"""What stands in memory during a run: prepared cheaply first, then opened with the weights."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jqlora.attach import bind
from jqlora.config import RunConfig
from jqlora.io import Cache, load, load_tokenizer
from jqlora.methods import Plan
from jqlora.run import choices
from jqlora.run.answers import Answerer, check_answers
from jqlora.run.data import RunData, read_records_of
from jqlora.run.keeping import keep
from jqlora.run.loading import LoadingBar
from jqlora.run.sizes import Sizes, plan_run
from jqlora.run.tasks import outputs_of, read_task
from jqlora.train.directory import RunDirectory
from jqlora.train.evaluate import Evaluation, evaluate, make_eval_step
from jqlora.train.task_loss import loss_for
from jqlora.types import Adapters, Params

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The model in shapes with its plan, the tokenizer, the encoded records, and where codes are
    kept."""

    sizes: Sizes
    tokenizer: Any
    data: RunData
    cache: Cache | None


def prepare(config: RunConfig, say: Say) -> Prepared:
    """All that can fail early; only headers of the model's files are read."""
    sizes = plan_run(config)
    tokenizer = load_tokenizer(config.model.source)
    if config.data.task is None:
        data = read_records_of(config, tokenizer)
    else:
        data = read_task(config, tokenizer, sizes.model)
    choices.optimizer_of(config, sizes.plan, data.loader.total_steps)  # its schedule may not fit
    for line in (*sizes.lines(), *data.messages):
        say(line)
    return Prepared(sizes, tokenizer, data, keep(config.model.cache, say))


@dataclasses.dataclass(frozen=True)
class Base:
    """The model and its weights, which a run leaves as they are."""

    model: nn.Module
    params: Params
    load_seconds: float


@dataclasses.dataclass(frozen=True)
class Instruments:
    """How adapters are measured: losses and scores by name, and answers to the run's questions."""

    evaluate: Callable[[Adapters], dict[str, Evaluation]]
    ask: Callable[[Adapters], list[str]]


@dataclasses.dataclass(frozen=True)
class Session:
    """What stands in memory during a run."""

    config: RunConfig
    run: RunDirectory
    base: Base
    plan: Plan
    data: RunData
    instruments: Instruments


def open_session(config: RunConfig, run: RunDirectory, prepared: Prepared, say: Say) -> Session:
    """Load the weights."""
    base, planned = open_base(config, prepared, say), prepared.sizes.plan
    measured_by = instruments(config, prepared, base, bind(base.model, planned))
    return Session(config, run, base, planned, prepared.data, measured_by)


def open_base(config: RunConfig, prepared: Prepared, say: Say) -> Base:
    """Load the weights."""
    sizes, begin = prepared.sizes, time.perf_counter()
    with LoadingBar(config.model.source, say) as bar:
        _, params = load(
            config.model.source,
            seed=config.data_seed,
            cache=prepared.cache,
            progress=bar,
            **sizes.chosen.loading,
        )
    return Base(sizes.model, params, time.perf_counter() - begin)


def instruments(
    config: RunConfig, prepared: Prepared, base: Base, apply: Callable[..., Any]
) -> Instruments:
    """Compiled once for adapters of ``apply``."""
    model, params = base.model, base.params
    eval_step = make_eval_step(apply, loss=loss_for(model), outputs=outputs_of(config.data.task))

    def evaluations(adapters: Adapters) -> dict[str, Evaluation]:
        found = {}
        for name, on in prepared.data.evaluations.items():
            found[name] = evaluate(eval_step, params, adapters, on.batches, on.score)
            if on.write is not None:
                scores = on.write(model, apply, {"params": params, **adapters})
                found[name] = dataclasses.replace(found[name], metrics=scores)
        return found

    answerer = Answerer(
        [*prepared.data.prompts, *prepared.data.checks],
        model=model,
        apply=apply,
        tokenizer=prepared.tokenizer,
        template=choices.template(config),
        max_new_tokens=config.sample.max_new_tokens,
    )
    return Instruments(evaluations, lambda adapters: answerer.ask({"params": params, **adapters}))


def measure_all(session: Session, adapters: Adapters) -> dict[str, Any]:
    """``evaluations`` by name, ``answers`` to the prompts, and ``checks`` of general knowledge."""
    data, count = session.data, len(session.config.sample.prompts)
    texts, found = session.instruments.ask(adapters), session.instruments.evaluate(adapters)
    return {
        "evaluations": {name: one.record() for name, one in found.items()},
        "answers": [
            {"prompt": prompt, "answer": text}
            for prompt, text in zip(session.config.sample.prompts, texts[:count], strict=True)
        ],
        "checks": check_answers(data.checks, texts[count:]),
    }
