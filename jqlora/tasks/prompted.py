"""Texts that a causal model writes to a text: prompts that end in a cue, and what is learnt after.

A prompt is the text and "TL;DR:", as GPT-2 was asked (Radford et al. 2019, section 3.6). Learnt are
the written text and the token that ends it, nothing of the prompt.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jqlora.data import Example
from jqlora.data.tokenize import plain_ids
from jqlora.errors import DataError
from jqlora.tasks.features import Report
from jqlora.tasks.summaries import Summary

CUE = "\n\nTL;DR:"


def prompt_of(document: str, tokenizer: Any, *, prefix: str, max_length: int) -> np.ndarray:
    """int32 [n]: ``prefix``, the text and :data:`CUE`. The text loses its end where they would be
    more than ``max_length`` tokens."""
    cue = np.asarray(tokenizer.encode(CUE, add_special_tokens=False), np.int32)
    return np.concatenate([plain_ids(prefix + document, tokenizer)[: max_length - len(cue)], cue])


def prompted_examples(
    records: Sequence[Summary],
    tokenizer: Any,
    *,
    prefix: str,
    max_length: int,
    target_length: int,
    truncate: bool,
) -> tuple[list[Example], Report]:
    """Prompts of at most ``max_length`` tokens, each with its summary of at most ``target_length``
    behind it.

    What is longer is an error, or with ``truncate`` loses its end. Raises DataError also where the
    tokenizer has no token to end in.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, which ends what is written")
    examples, shortened = [], []
    for record in records:
        whole = prompt_of(record.document, tokenizer, prefix=prefix, max_length=2**30)
        written = tokenizer.encode(f" {record.summary.strip()}", add_special_tokens=False)
        written = np.asarray([*written, tokenizer.eos_token_id], np.int32)
        for ids, limit, setting in (
            (whole, max_length, "data.length"),
            (written, target_length, "data.target_length"),
        ):
            if len(ids) > limit and not truncate:
                raise DataError(
                    f"{record.origin}: {len(ids)} tokens, more than the {limit} allowed; raise "
                    f"{setting}, or set data.too_long to 'truncate'"
                )
        if len(whole) > max_length or len(written) > target_length:
            shortened.append(record.origin)
        prompt = prompt_of(record.document, tokenizer, prefix=prefix, max_length=max_length)
        ids = np.concatenate([prompt, written[:target_length]])
        examples.append(Example(ids, np.arange(len(ids)) >= len(prompt), record.origin))
    longest = max(map(len, examples))
    return examples, Report(len(records), len(examples), longest, tuple(shortened))


def prompts_in(examples: Sequence[Example]) -> list[np.ndarray]:
    """What stands before the first token learnt, of each."""
    return [example.input_ids[: int(example.loss_mask.argmax())] for example in examples]
