"""What stands in memory during a run: prepared cheaply first, then opened with the weights."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jqlora.attach import bind, plan
from jqlora.config import RunConfig
from jqlora.io import load, load_tokenizer
from jqlora.methods import Plan
from jqlora.run import choices
from jqlora.run.answers import Answerer, check_answers
from jqlora.run.data import RunData, read_data
from jqlora.run.loading import LoadingBar
from jqlora.run.sizes import plan_run
from jqlora.train.directory import RunDirectory
from jqlora.train.evaluate import Evaluation, evaluate, make_eval_step
from jqlora.types import Adapters, Params

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The tokenizer and the encoded records."""

    tokenizer: Any
    data: RunData


def prepare(config: RunConfig, say: Say) -> Prepared:
    """All that can fail early; only headers of the model's files are read."""
    sizes = plan_run(config)
    tokenizer = load_tokenizer(config.model.source)
    data = read_data(config, tokenizer)
    choices.optimizer_of(config, sizes.plan, data.loader.total_steps)  # its schedule may not fit
    for line in (*sizes.lines(), *data.messages):
        say(line)
    return Prepared(tokenizer, data)


@dataclasses.dataclass(frozen=True)
class Session:
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


def open_session(config: RunConfig, run: RunDirectory, prepared: Prepared, say: Say) -> Session:
    """Load the weights and plan the adapters."""
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
    return Session(config, run, model, params, planned, prepared.data, measure, answerer, seconds)


def measure_all(session: Session, adapters: Adapters) -> dict[str, Any]:
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
