"""Texts that a model writes to a task's texts, greedily, and their scores."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jqlora.generation import generate
from jqlora.run.answers import end_tokens, left_padded
from jqlora.tasks import Task
from jqlora.tasks.batches import in_order
from jqlora.tasks.summaries import Summary, rouge
from jqlora.train.loss import Batch
from jqlora.types import Variables

Write = Callable[[Any, Any, Variables], dict[str, float]]
"""``write(model, apply, variables)``: scores of what was written."""


def writer(
    task: Task,
    records: Sequence[Summary],
    batches: Sequence[Batch],
    order: Sequence[int],
    *,
    tokenizer: Any,
    max_new_tokens: int,
) -> Write:
    """ROUGE of what an encoder-decoder writes to batches; their rows are the records in
    ``order``."""

    def write(model: Any, apply: Any, variables: Variables) -> dict[str, float]:
        texts: list[str] = []
        for batch in batches:
            tokens = generate(
                apply,
                variables,
                batch["input_ids"],
                batch["attention_mask"],
                model=model,
                max_new_tokens=max_new_tokens,
                eos_ids=end_tokens(model, tokenizer),
            )
            texts += tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
        return rouge(task, in_order(texts, order), [record.summary for record in records])

    return write


def causal_writer(
    task: Task,
    prompts: Sequence[np.ndarray],
    wanted: Sequence[str],
    *,
    tokenizer: Any,
    rows: int,
    max_new_tokens: int,
) -> Write:
    """ROUGE of what a causal model writes after prompts int32 [n], so many of them at once."""

    def write(model: Any, apply: Any, variables: Variables) -> dict[str, float]:
        longest = max(map(len, prompts))
        texts: list[str] = []
        for start in range(0, len(prompts), rows):
            chunk = prompts[start : start + rows]
            tokens = generate(
                apply,
                variables,
                *left_padded(chunk, rows=rows, length=longest),
                model=model,
                max_new_tokens=max_new_tokens,
                eos_ids=end_tokens(model, tokenizer),
            )
            texts += tokenizer.batch_decode(
                np.asarray(tokens)[: len(chunk)], skip_special_tokens=True
            )
        return rouge(task, [text.strip() for text in texts], wanted)

    return write
