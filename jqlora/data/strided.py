"""Whole documents in overlapping windows, each of their tokens predicted once.

As transformers' guide to perplexity does it: windows of ``length`` tokens begin ``stride`` tokens
apart, and of each only the tokens count that no earlier window had. So every counted token but the
first ones sees at least ``length - stride`` tokens before it.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jqlora.data.sources import Sources, files_of, read_records, text_of
from jqlora.data.tokenize import Example, plain_ids
from jqlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE = (".txt", ".md")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that is measured as one."""

    text: str
    origin: str


def read_documents(source: Sources) -> list[Document]:
    """Text files as one document each, and each record of plain text in other files.

    Raises SourceError and DataError as :func:`jqlora.data.read_records` does, and DataError for
    records that are not plain text.
    """
    found: list[Document] = []
    for one in [source] if isinstance(source, str | Path) else source:
        name = str(one)
        paths = [] if name.startswith("datasets:") else files_of(name)
        if paths and all(path.suffix.lower() in WHOLE for path in paths):
            found += [Document(text_of(path), str(path)) for path in paths]
            continue
        for record in read_records(name):
            if record.kind != "text":
                raise DataError(
                    f"{record.origin}: perplexity of documents is that of plain text, the field "
                    "'text'; leave --task out to measure answers"
                )
            found.append(Document(record.text, record.origin))
    return found


def strided(
    document: Document,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    stride: int,
) -> list[Example]:
    """The document's windows, with a begin-of-sequence token where the tokenizer puts one.

    All its tokens are targets in one window each, but the first. Raises DataError for a stride that
    leaves no context, and for a document of fewer than two tokens.
    """
    if not 0 < stride < length:
        raise DataError(f"a stride of {stride} must lie between 1 and {length - 1}")
    ids = plain_ids(document.text, tokenizer)
    if len(ids) < 2:
        raise DataError(f"{document.origin}: a text of {len(ids)} tokens has none to predict")
    windows, done = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        mask = np.arange(begin, end) >= done
        windows.append(Example(ids[begin:end], mask, document.origin))
        done = end
        if end == len(ids):
            break
    return windows
