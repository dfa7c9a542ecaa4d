"""Texts of which a model guesses hidden tokens (Devlin et al. 2019, section 3.1).

Of 15 % of the tokens each is asked for: 80 % of those are hidden behind the mask token, 10 % are
replaced by any token, 10 % stay. Other ones each time that a text is trained on (Liu et al. 2019,
section 4.1), and always the same where it is measured on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jqlora.data.sources import Sources, read_rows
from jqlora.errors import ConfigError, DataError
from jqlora.tasks.features import NOTHING, Feature, Report, inputs_of
from jqlora.tasks.table import Task

ASKED, HIDDEN, REPLACED = 0.15, 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class Masking:
    """Hides tokens behind ``mask_id``, or replaces them by any of ``vocabulary``."""

    mask_id: int
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Masking":
        """As this tokenizer has it; ConfigError for one without a mask token."""
        if tokenizer.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token, which masked_lm needs")
        return cls(tokenizer.mask_token_id, len(tokenizer))

    def __call__(
        self, batch: Mapping[str, np.ndarray], generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The batch with tokens of ``input_ids`` hidden; ``labels``, the tokens that may be asked
        for, become those that are, -100 elsewhere."""
        ids, labels = batch["input_ids"], batch["labels"]
        asked = (labels != NOTHING["labels"]) & (generator.random(ids.shape) < ASKED)
        fate = generator.random(ids.shape)
        other = generator.integers(0, self.vocabulary, ids.shape)
        other = np.where(fate < HIDDEN + REPLACED, other, ids)
        hidden = np.where(fate < HIDDEN, self.mask_id, other)
        return {
            **batch,
            "input_ids": np.where(asked, hidden, ids).astype(np.int32),
            "labels": np.where(asked, labels, NOTHING["labels"]).astype(np.int32),
        }

    def once(self, features: Sequence[Feature]) -> list[Feature]:
        """The features with tokens hidden that depend on a feature's place alone."""
        made = []
        for i, feature in enumerate(features):
            arrays = {**feature.inputs, **feature.targets}
            masked = self(arrays, np.random.default_rng(i))
            inputs = {name: masked[name] for name in feature.inputs}
            made.append(Feature(inputs, {"labels": masked["labels"]}, feature.origin))
        return made


def text_features(
    task: Task, source: Sources, tokenizer: Any, *, max_length: int, too_long: str
) -> tuple[list[Feature], Report]:
    """A row for each text, with all tokens but special ones as ``labels``.

    A row longer than ``max_length`` is an error, loses its end (``"truncate"``), or becomes several
    (``"split"``). Raises SourceError and DataError as :func:`jqlora.data.read_records` does.
    """
    rows = read_rows(source)
    texts = [_text(task, origin, row) for origin, row in rows]
    encoded = tokenizer(texts, verbose=False)
    over = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
    if over and too_long == "error":
        raise DataError(
            f"{rows[over[0]][0]}: {len(encoded['input_ids'][over[0]])} tokens, more than the "
            f"{max_length} allowed; raise data.length, or set data.too_long to 'truncate' or "
            "'split'"
        )
    of_text: Sequence[int] = range(len(texts))
    if over:
        split = too_long == "split"
        options = {"truncation": True, "max_length": max_length}
        encoded = tokenizer(texts, return_overflowing_tokens=split, **options)
        if split:
            of_text = encoded["overflow_to_sample_mapping"]
    special = tokenizer.all_special_ids
    features = []
    for i, text in enumerate(of_text):
        inputs = inputs_of(encoded, i)
        ids = inputs["input_ids"]
        labels = np.where(np.isin(ids, special), NOTHING["labels"], ids).astype(np.int32)
        features.append(Feature(inputs, {"labels": labels}, rows[text][0]))
    shortened = tuple(rows[i][0] for i in over)
    return features, Report(len(texts), len(features), max(map(len, features)), shortened)


def _text(task: Task, origin: str, row: Any) -> str:
    ((column,),) = task.texts
    text = row.get(column) if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{origin}: {task.name} is read from the column {column}, text")
    return text
