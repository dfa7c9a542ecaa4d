"""What ``data.task`` asks of the other settings, and which contradict it."""

from typing import TYPE_CHECKING

from jqlora.errors import ConfigError
from jqlora.models.tasks import GENERATING
from jqlora.tasks import TASKS, task_named

if TYPE_CHECKING:
    from jqlora.config.schema import DataConfig, RunConfig

TRAINABLE = tuple(name for name, task in TASKS.items() if task.kind != "choices")
"""Tasks that one trains on."""
OF_TEXT = ("heldout", "heldout_share", "general", "train_on", "template")
FITTING = {"spans": ("error", "split"), "masked": ("error", "truncate", "split")}
"""What may become of long records, by the kind of task, where it is not error or truncate."""
OF_TASKS = ("validation", "labels", "stride", "prefix", "target_length")


def check_data(data: "DataConfig") -> None:
    """Raise ConfigError for settings of text beside a task, or of a task beside text."""
    if data.task is None:
        _refuse_changed(data, OF_TASKS, "needs data.task")
        return
    try:
        task = task_named(data.task)
    except ConfigError as error:
        raise ConfigError(f"data.task={error}") from error
    if task.name not in TRAINABLE:
        raise ConfigError(
            f"data.task={task.name!r} is only measured, by 'jqlora eval'; trained on are "
            f"{', '.join(TRAINABLE)}"
        )
    _refuse_changed(data, OF_TEXT, f"is for text, not for data.task={task.name!r}")
    if data.packing:
        raise ConfigError("data.packing=true: a task has one record a row; leave it null")
    fitting = FITTING.get(task.kind, ("error", "truncate"))
    if data.too_long not in fitting:
        raise ConfigError(
            f"data.too_long={data.too_long!r}: {task.name} takes {' or '.join(map(repr, fitting))}"
        )
    if data.labels and (not task.has_labels or task.labels or task.number):
        raise ConfigError(f"data.labels: {task.name} has labels of its own; leave it out")
    if len(set(data.labels)) < len(data.labels):
        raise ConfigError("data.labels names a class twice")


def check_head(config: "RunConfig") -> None:
    """Raise ConfigError where ``model.task`` or ``model.num_labels`` is not what the data ask."""
    model, data = config.model, config.data
    if data.task is None:
        if model.task not in (None, "causal-lm"):
            raise ConfigError(
                f"model.task={model.task!r} needs data.task, one of {', '.join(TRAINABLE)}"
            )
        if model.num_labels is not None:
            raise ConfigError("model.num_labels needs data.task")
        return
    task = TASKS[data.task]
    heads = GENERATING if task.kind == "texts" else (task.head,)
    if model.task is not None and model.task not in heads:
        raise ConfigError(
            f"model.task={model.task!r}, but data.task={task.name!r} needs "
            f"{' or '.join(map(repr, heads))}"
        )
    if not task.has_labels and model.num_labels is not None:
        raise ConfigError(f"model.num_labels has no meaning for data.task={task.name!r}")
    known = task.num_labels or len(data.labels) or None
    if None not in (known, model.num_labels) and known != model.num_labels:
        raise ConfigError(
            f"model.num_labels={model.num_labels}, but data.task={task.name!r} has {known}"
        )
    if task.has_labels and known is None and model.num_labels is None:
        raise ConfigError(f"data.task={task.name!r} needs model.num_labels or data.labels")
    if config.sample.prompts:
        raise ConfigError("sample.prompts: are for text, not for a data.task")


def _refuse_changed(data: "DataConfig", names: tuple[str, ...], reason: str) -> None:
    for name in names:
        default = type(data).__dataclass_fields__[name].default
        if getattr(data, name) != default:
            raise ConfigError(f"data.{name} {reason}")
