"""Texts that a model writes to a task's texts, greedily, and their scores."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jqlora.data.tokenize import plain_ids
from jqlora.generation import generate
from jqlora.run.answers import end_tokens, left_padded
from jqlora.tasks import Task
from jqlora.tasks.batches import in_order
from jqlora.tasks.summaries import Summary, rouge
from jqlora.train.loss import Batch
from jqlora.types import Variables

CUE = "\n\nTL;DR:"
"""What a causal model is given after a text, as GPT-2 was (Radford et al. 2019)."""
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


def summaries_of_causal(
    task: Task,
    records: Sequence[Summary],
    opened: Any,
    *,
    prefix: str,
    length: int,
    rows: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """ROUGE of what a causal model writes after ``prefix``, the text and :data:`CUE`.

    A text loses its end where it would leave the prompt longer than ``length`` tokens.
    """
    cue = np.asarray(opened.tokenizer.encode(CUE, add_special_tokens=False), np.int32)
    prompts = [
        np.concatenate(
            [plain_ids(prefix + record.document, opened.tokenizer)[: length - len(cue)], cue]
        )
        for record in records
    ]
    longest = max(map(len, prompts))
    texts: list[str] = []
    for start in range(0, len(prompts), rows):
        chunk = prompts[start : start + rows]
        tokens = generate(
            opened.apply,
            opened.variables,
            *left_padded(chunk, rows=rows, length=longest),
            model=opened.model,
            max_new_tokens=max_new_tokens,
            eos_ids=end_tokens(opened.model, opened.tokenizer),
        )
        texts += opened.tokenizer.batch_decode(
            np.asarray(tokens)[: len(chunk)], skip_special_tokens=True
        )
    return rouge(task, [text.strip() for text in texts], [record.summary for record in records])
