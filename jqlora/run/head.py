"""Which head a run puts on its model, and that a fresh one is trained whole.

PEFT trains the head of a classifier whole and saves it beside the adapters (``modules_to_save``);
so it is here, and whatever else the checkpoint lacks and is drawn at random, such as a pooler.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jqlora.config import MethodConfig, RunConfig
from jqlora.errors import ConfigError
from jqlora.io import fresh_head
from jqlora.io.checkpoint import family_at
from jqlora.io.load import describe, describe_config
from jqlora.io.source import WEIGHTS, resolve
from jqlora.models.tasks import trained_whole
from jqlora.quant.params import SKIP
from jqlora.run import choices
from jqlora.tasks import TASKS, Task
from jqlora.types import Params

HEADS = ("pooler", "classifier", "classification_head", "qa_outputs")
"""Modules that a checkpoint of another head lacks."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """``loading`` are the arguments of ``jq.load`` that the config means, but for the seed;
    ``method`` has the head among its ``modules_to_save``."""

    loading: dict[str, Any]
    method: MethodConfig


def choose(config: RunConfig) -> Chosen:
    """Which head the config's model gets; the headers of its files say what of it is fresh."""
    asked, method = head_of(config), config.method
    fresh = fresh_modules(config.model.source, asked)
    if asked:
        _, params = describe(config.model.source, **asked)
        heads = trained_whole(asked["task"], params)
        whole = dict.fromkeys([*method.modules_to_save, *heads, *fresh])
        method = dataclasses.replace(method, modules_to_save=tuple(whole))
    loading = {
        "quantize": choices.quantization(config.model.quantize),
        "dtype": choices.compute_dtype(config.model),
        "skip": (*SKIP, *fresh),
        **asked,
    }
    return Chosen(loading, method)


def with_skip(source: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the head, and that no part of it is stored as codes."""
    return {**asked, "skip": (*SKIP, *fresh_modules(source, asked))}


def head_of(config: RunConfig) -> dict[str, Any]:
    """``task`` and ``num_labels`` of the model; nothing asked where the run trains on text."""
    if config.data.task is None:
        return {}
    task = TASKS[config.data.task]
    if task.kind == "texts":
        return {"task": config.model.task or _writing_task(config.model.source)}
    return head_for(task, config.model.num_labels or len(config.data.labels) or None)


def _writing_task(source: str) -> str:
    """The task of the head by which a model writes: its family has one of them, or is refused for
    the lack of the other."""
    heads = family_at(resolve(source)).heads.values()
    return "causal-lm" if "causal-lm" in heads else "seq2seq-lm"


def head_for(task: Task, count: int | None) -> dict[str, Any]:
    """``task`` and ``num_labels`` of the model that serves a task, with ``count`` labels if it has
    no number of its own; None is the checkpoint's."""
    if not task.has_labels:
        return {"task": task.head}
    return {"task": task.head, "num_labels": task.num_labels or count}


def describe_model(
    config: RunConfig, chosen: Chosen, *, weightless: bool = False
) -> tuple[Any, Params]:
    """The config's model and the shapes of its parameters, from the headers of its files.

    ``weightless`` allows a directory with a config.json and nothing else, for a run on text. Raises
    ConfigError for a model whose head is not what the run trains.
    """
    source = config.model.source
    if weightless and config.data.task is None and is_weightless(source):
        model, params = describe_config(source, **chosen.loading)
    else:
        model, params = describe(source, **chosen.loading)
    found: Any = model
    if config.data.task is None and found.task != "causal-lm":
        raise ConfigError(
            f"{config.model.source} has a head for {found.task}, and text is learnt by a causal "
            "language model: name a data.task, or another model.source"
        )
    return ready(config, found), params


def is_weightless(source: str) -> bool:
    """Whether this is a directory that tells a model's shape and holds no weights."""
    folder = Path(source).expanduser()
    found = any((folder / name).exists() for name in WEIGHTS) or any(folder.glob("*.gguf"))
    return (folder / "config.json").exists() and not found


def ready(config: RunConfig, model: Any) -> Any:
    """The model with the config's rematerialization and attention."""
    return model.clone(remat=config.model.remat, attention=config.model.attention)


def fresh_modules(source: str, asked: dict[str, Any]) -> tuple[str, ...]:
    """The modules of which something is drawn at random, for the head that is asked for."""
    if not asked:
        return ()
    names = fresh_head(source, **asked)
    if names and asked["task"] == "masked-lm":
        raise ConfigError(
            f"{source} has no masked-LM head ({', '.join(names[:2])}, ...), and adapters alone do "
            "not train a new one: name a checkpoint that has"
        )
    parts = (part for name in names for part in name.split("."))
    return tuple(dict.fromkeys(part for part in parts if part in HEADS))
