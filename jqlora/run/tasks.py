"""The rows of a run's task, made into batches and what they are scored by."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jqlora.config import RunConfig
from jqlora.errors import ConfigError
from jqlora.models.seq2seq import EncoderDecoder
from jqlora.models.seq2seq_heads import end_of
from jqlora.run.data import RunData, check_warmup
from jqlora.run.prompted import read_prompted
from jqlora.run.reading import Reading, left_out
from jqlora.tasks import TASKS, Task
from jqlora.tasks.batches import training_batches
from jqlora.tasks.features import Feature
from jqlora.tasks.scoring import OUTPUTS, check_scorable


def read_task(config: RunConfig, tokenizer: Any, model: Any) -> RunData:
    """Read and lay out the rows of the config's task for a model with its head.

    Raises SourceError, DataError and ConfigError as the reading of the task does.
    """
    data, train = config.data, config.train
    task = TASKS[data.task or ""]
    check_scorable(task)
    if task.kind == "texts" and model.task == "causal-lm":
        return read_prompted(config, task, tokenizer, model, _validation(config))
    reading = Reading(
        task=task,
        tokenizer=tokenizer,
        length=data.length,
        too_long=data.too_long,
        stride=data.stride,
        labels=data.labels,
        numbering=numbering_of(task, model),
        prefix=data.prefix,
        target_length=data.target_length,
    )
    features, report, broken, _ = reading.features(data.train)
    _check_labels(task, features, model)
    loader = training_batches(
        features,
        reading.collate(train.batch_size),
        seed=config.data_seed,
        epochs=train.epochs,
        steps=train.steps,
        draw=reading.draw(),
    )
    check_warmup(config, loader)
    messages = [f"training: {line}" for line in (*report.lines(), *left_out(broken))]
    messages.append(
        f"training: {loader.total_steps} steps of {train.batch_size} rows of at most {data.length} "
        f"tokens; {loader.steps_per_epoch} steps an epoch"
    )
    evaluations = {}
    for name, source in _validation(config).items():
        evaluations[name], said = reading.measured(source, train.batch_size // train.accumulate)
        messages += [f"{name}: {line}" for line in said]
    return RunData(loader, evaluations, messages)


def outputs_of(task: str | None) -> tuple[str, ...]:
    """What is kept of a model's outputs when a task is measured; nothing of text's."""
    return () if task is None else OUTPUTS[TASKS[task].kind]


def numbering_of(task: Task, model: Any) -> tuple[int, ...] | None:
    """The model's numbers of the task's classes, where its config names the same ones in another
    order, as a published MNLI model does; None where it has no names of its own.

    Raises ConfigError where its head has another number of labels.
    """
    count = task.num_labels
    if not task.has_labels or count is None:
        return None
    names = [name.lower() for name in model.config.labels]
    if len(names) != count:
        raise ConfigError(f"{task.name} has {count} labels, the model's head {len(names)}")
    known = [name.lower() for name in task.labels]
    if known and sorted(names) == sorted(known):
        return tuple(names.index(name) for name in known)
    return None


def _validation(config: RunConfig) -> dict[str, Any]:
    given = config.data.validation
    if given is None:
        return {}
    if isinstance(given, dict):
        return {f"validation_{name}": source for name, source in given.items()}
    return {"validation": given}


def _check_labels(task: Task, features: Sequence[Feature], model: Any) -> None:
    """Raise ConfigError for a label that the head lacks, and for a text without the end token at
    which an encoder-decoder reads its class."""
    if not task.has_labels or task.number:
        return
    count = model.config.num_labels
    for feature in features:
        largest = int(np.max(feature.targets["labels"]))
        if largest >= count:
            raise ConfigError(
                f"{feature.origin}: the label {largest} is beyond the {count} of model.num_labels"
            )
    if task.kind == "labels" and isinstance(model, EncoderDecoder):
        end = end_of(model.config)
        for feature in features:
            if end not in feature.inputs["input_ids"]:
                raise ConfigError(
                    f"{feature.origin}: the tokenizer ends the text in no token {end}, at which "
                    f"{type(model).__name__} reads its class"
                )
