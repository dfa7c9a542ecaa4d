"""Asking a model the config's questions, the same way before and after training."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jqlora.config import RunConfig
from jqlora.data import Record, encode_prompt
from jqlora.generate import generate
from jqlora.run import choices
from jqlora.run.data import prompt_like
from jqlora.types import Variables


class Answerer:
    """Greedy answers to ``sample.prompts``, all in one batch; compiled at the first call."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        apply: Callable[..., Any],
        tokenizer: Any,
        like: Record,
    ):
        """Encodes the prompts in the form of the training record ``like``."""
        self._model, self._apply, self._tokenizer = model, apply, tokenizer
        self._prompts = config.sample.prompts
        self._count = config.sample.max_new_tokens
        template = choices.template(config)
        self._ids = [
            encode_prompt(prompt_like(like, prompt), tokenizer, template=template)
            for prompt in self._prompts
        ]

    def ask(self, variables: Variables) -> list[dict[str, str]]:
        """``prompt`` and ``answer`` of each, special tokens left out."""
        if not self._prompts:
            return []
        ids, mask = left_padded(self._ids)
        tokens = generate(
            self._apply,
            variables,
            jnp.asarray(ids),
            jnp.asarray(mask),
            model=self._model,
            max_new_tokens=self._count,
            eos_ids=end_tokens(self._model, self._tokenizer),
        )
        texts = self._tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
        return [
            {"prompt": prompt, "answer": text.strip()}
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]


def left_padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of unequal lengths as int32 ``[B, T]`` padded on the left, and their mask."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), np.int32)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer, according to the model's config and the tokenizer."""
    ends = {*model.config.eos_token_ids, tokenizer.eos_token_id}
    return tuple(sorted(end for end in ends if end is not None))
