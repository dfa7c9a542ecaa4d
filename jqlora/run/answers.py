"""Asking a model questions, the same way before and after training."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from jqlora.data import Record, encode_prompt, says
from jqlora.generation import generate
from jqlora.types import Variables

ROWS = 64
"""Questions in one batch."""


class Answerer:
    """Greedy answers to a fixed list of records' questions."""

    def __init__(
        self,
        records: Sequence[Record],
        *,
        model: nn.Module,
        apply: Callable[..., Any],
        tokenizer: Any,
        template: Any,
        max_new_tokens: int,
    ):
        """Encodes the prompts; raises DataError for one that the template refuses."""
        self._model, self._apply, self._tokenizer = model, apply, tokenizer
        self._count = max_new_tokens
        self._prompts = [encode_prompt(record, tokenizer, template=template) for record in records]

    def ask(self, variables: Variables) -> list[str]:
        """One answer a record, special tokens left out; compiled at the first call."""
        texts: list[str] = []
        rows = min(ROWS, len(self._prompts))
        for start in range(0, len(self._prompts), ROWS):
            chunk = self._prompts[start : start + ROWS]
            ids, mask = left_padded(chunk, rows=rows, length=max(map(len, self._prompts)))
            tokens = generate(
                self._apply,
                variables,
                ids,
                mask,
                model=self._model,
                max_new_tokens=self._count,
                eos_ids=end_tokens(self._model, self._tokenizer),
            )
            answers = np.asarray(tokens)[: len(chunk)]
            texts += self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]


def check_answers(records: Sequence[Record], answers: Sequence[str]) -> list[dict[str, Any]]:
    """For each record with an expected word: the answer, and whether it says that word."""
    return [
        {"expect": record.expect, "answer": answer, "right": says(answer, record.expect)}
        for record, answer in zip(records, answers, strict=True)
    ]


def left_padded(
    prompts: Sequence[np.ndarray], *, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 ``[rows, length]``, padded on the left; the last prompt fills rows."""
    ids, mask = np.zeros((2, rows, length), np.int32)
    for i in range(rows):
        prompt = prompts[min(i, len(prompts) - 1)]
        ids[i, length - len(prompt) :] = prompt
        mask[i, length - len(prompt) :] = 1
    return ids, mask


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer, according to the model's config and the tokenizer."""
    ends = {*model.config.eos_token_ids, tokenizer.eos_token_id}
    return tuple(sorted(end for end in ends if end is not None))
