"""Training a causal model to write a task's texts: one row for each, scored by what it writes."""

from typing import Any

from jqlora.config import RunConfig
from jqlora.data import make_loader
from jqlora.errors import ConfigError
from jqlora.run.data import RunData, check_warmup
from jqlora.run.writing import causal_writer
from jqlora.tasks import Task
from jqlora.tasks.prompted import prompted_examples, prompts_in
from jqlora.tasks.summaries import read_summaries
from jqlora.train.evaluate import Measured


def read_prompted(
    config: RunConfig, task: Task, tokenizer: Any, model: Any, validation: dict[str, Any]
) -> RunData:
    """Read and lay out the rows of a task whose texts are written behind a prompt.

    ``data.length`` bounds the prompt and ``data.target_length`` what is written, as for an
    encoder-decoder. Raises as the reading does, and ConfigError for more tokens than positions.
    """
    data, train = config.data, config.train
    total = data.length + data.target_length
    if total > model.config.longest:
        raise ConfigError(
            f"data.length={data.length} and data.target_length={data.target_length} exceed the "
            f"{model.config.longest} positions of {config.model.source} together"
        )

    def examples_of(source: Any) -> Any:
        records = read_summaries(task, source)
        examples, report = prompted_examples(
            records,
            tokenizer,
            prefix=data.prefix,
            max_length=data.length,
            target_length=data.target_length,
            truncate=data.too_long == "truncate",
        )
        return records, examples, report

    _, examples, report = examples_of(data.train)
    loader = make_loader(
        examples,
        batch_size=train.batch_size,
        packing=False,
        seed=config.data_seed,
        epochs=train.epochs,
        steps=train.steps,
    )
    check_warmup(config, loader)
    messages = [f"training: {line}" for line in report.lines()]
    messages.append(
        f"training: {loader.total_steps} steps of {train.batch_size} rows; "
        f"{loader.steps_per_epoch} steps an epoch"
    )
    evaluations = {}
    rows = train.batch_size // train.accumulate
    for name, source in validation.items():
        records, examples, report = examples_of(source)
        messages += [f"{name}: {line}" for line in report.lines()]
        batches = make_loader(examples, batch_size=rows, packing=False, epochs=1, shuffle=False)
        write = causal_writer(
            task,
            prompts_in(examples),
            [record.summary for record in records],
            tokenizer=tokenizer,
            rows=rows,
            max_new_tokens=data.target_length,
        )
        evaluations[name] = Measured(list(batches), write=write)
    return RunData(loader, evaluations, messages)
