"""Which head an adapter in PEFT's format was trained with, as its own files tell."""

import os
from pathlib import Path
from typing import Any

from jqlora.io.peft import open_adapter
from jqlora.io.peft_config import PREFIX, TASK_TYPES
from jqlora.io.peft_spec import read_config
from jqlora.models.tasks import LABELLED

LAST = tuple(
    f"{name}.weight"
    for name in ("classifier", "classifier.out_proj", "classification_head.out_proj")
)
"""Names of the matrices whose rows are labels."""


def head_of(adapter: str | os.PathLike) -> dict[str, Any]:
    """``task`` and ``num_labels``, as ``jq.load`` takes them, as far as the adapter says them.

    The task is PEFT's ``task_type``; the labels are the rows of a classifier that was trained
    whole. Raises ``AdapterFileError`` for files that cannot be read.
    """
    folder = Path(adapter)
    word = read_config(folder).get("task_type")
    task = next((ours for ours, theirs in TASK_TYPES.items() if theirs == word), None)
    if task is None:
        return {}
    if task not in LABELLED:
        return {"task": task}
    reader = open_adapter(folder)
    names = set(reader.names())
    rows = [reader.info(PREFIX + last).shape[0] for last in LAST if PREFIX + last in names]
    return {"task": task} | ({"num_labels": rows[0]} if rows else {})
