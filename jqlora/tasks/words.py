"""Words with a tag each: entities, parts of speech, chunks.

Read are rows with a list of words and a list of tags, and the columns of CoNLL's shared tasks: a
word and its tags on a line, the last of which is taken, and a blank line between sentences. A word
of several tokens has its tag at the first; the others are not asked, as in transformers' examples.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from jqlora.data.sources import Row, Sources, read_rows, text_of
from jqlora.errors import ConfigError, DataError
from jqlora.tasks.features import NOTHING, Feature, Report, inputs_of
from jqlora.tasks.labelled import class_of
from jqlora.tasks.table import Task

SUFFIXES = (".txt", ".tsv", ".conll", ".iob", ".iob2", ".bio")
DOCUMENT = "-DOCSTART-"


@dataclasses.dataclass(frozen=True)
class Tagged:
    """A sentence's words and the numbers of their tags."""

    words: tuple[str, ...]
    tags: tuple[int, ...]
    origin: str


def read_tagged(task: Task, source: Sources, labels: Sequence[str] = ()) -> list[Tagged]:
    """All sentences of a source; ``labels`` name the tags of a task that has no names of its own.

    Raises SourceError and DataError as :func:`jqlora.data.read_records` does, ConfigError where
    nothing names the tags.
    """
    names = task.labels or tuple(labels)
    if not names:
        raise ConfigError(
            f"{task.name} needs the names of its tags in the order of their numbers: data.labels, "
            "or --labels"
        )
    found = []
    for origin, row in read_rows(source, dict.fromkeys(SUFFIXES, read_columns)):
        known = row if isinstance(row, Mapping) else {}
        column = next((name for name in task.label if name in known), None)
        if "tokens" not in known or column is None:
            accepted = " or ".join(task.label)
            raise DataError(f"{origin}: {task.name} is read from the columns tokens and {accepted}")
        words, tags = known["tokens"], known[column]
        lists = isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags) > 0
        if not lists or not all(isinstance(word, str) for word in words):
            raise DataError(f"{origin}: tokens and {column} must be lists of one length")
        numbers = tuple(class_of(tag, names, f"{origin}: {column}") for tag in tags)
        found.append(Tagged(tuple(words), numbers, origin))
    return found


def read_columns(path: Path) -> Iterator[Row]:
    """Sentences of a file in columns, with the first column as words and the last as tags."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*text_of(path).split("\n"), ""], start=1):
        cells = line.split()
        if cells and cells[0] == DOCUMENT:
            continue
        if cells and len(cells) < 2:
            raise DataError(f"{path}:{number}: expected a word and its tag, found {line!r}")
        if cells:
            words.append(cells[0])
            tags.append(cells[-1])
        elif words:
            yield f"{path}:{number - len(words)}", {"tokens": words, "tags": tags}
            words, tags = [], []


def tag_features(
    records: Sequence[Tagged],
    tokenizer: Any,
    *,
    max_length: int,
    truncate: bool,
    numbering: Sequence[int] | None = None,
) -> tuple[list[Feature], Report]:
    """One row for each sentence, with ``labels`` int32 [n] that are -100 at tokens not asked.

    A row longer than ``max_length`` is an error, or with ``truncate`` loses its last words.
    ``numbering`` gives the model's number of each tag. Raises DataError also where the tokenizer
    does not tell which word a token is of.
    """
    if not tokenizer.is_fast:
        raise DataError("tags need a tokenizer that tells words apart (tokenizer.json)")
    words = [_separate(record.words, tokenizer) for record in records]
    encoded = tokenizer(words, is_split_into_words=True, verbose=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    over = [i for i, length in enumerate(lengths) if length > max_length]
    if over and not truncate:
        raise DataError(
            f"{records[over[0]].origin}: the sentence has {lengths[over[0]]} tokens, more than the "
            f"{max_length} allowed ({len(over)} have); raise data.length, if the model has that "
            "many positions, or set data.too_long to 'truncate'"
        )
    if over:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    features = []
    for i, record in enumerate(records):
        tags = [tag if numbering is None else numbering[tag] for tag in record.tags]
        of_word = encoded.word_ids(i)
        first = [w is not None and w not in of_word[:t] for t, w in enumerate(of_word)]
        labels = [
            tags[w] if begins else NOTHING["labels"]
            for w, begins in zip(of_word, first, strict=True)
        ]
        targets = {"labels": np.asarray(labels, np.int32)}
        features.append(Feature(inputs_of(encoded, i), targets, record.origin))
    shortened = tuple(records[i].origin for i in over)
    return features, Report(len(records), len(features), max(map(len, features)), shortened)


def _separate(words: Sequence[str], tokenizer: Any) -> list[str]:
    """The words as they stand within a text: with a space in front where the tokenizer has it in
    its tokens and would not put it there (GPT-2's, RoBERTa's)."""
    cut = tokenizer.backend_tokenizer.pre_tokenizer
    joined = isinstance(cut, pre_tokenizers.ByteLevel) and not cut.add_prefix_space
    return [f" {word}" if joined else word for word in words]
