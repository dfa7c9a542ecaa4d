"""The tokenizer that belongs to a model, with its chat template, wherever the model came from."""

import os
from typing import TYPE_CHECKING

from jqlora.errors import CheckpointError, DataError
from jqlora.io.gguf_tokenizer import tokenizer_from_gguf
from jqlora.io.readers.gguf_header import open_gguf
from jqlora.io.source import Source, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(source: str | os.PathLike | Source) -> "PreTrainedTokenizerBase":
    """The tokenizer of ``source`` (as in ``load``), as transformers has it.

    A Hugging Face directory goes through transformers' ``AutoTokenizer``; a GGUF file is rebuilt
    from its metadata, without torch. ``tokenizer.apply_chat_template`` works where the files carry
    a template. Raises SourceError if there is no such model, DataError if it has no tokenizer or
    one that cannot be used.
    """
    found = resolve(source)
    if found.kind == "gguf":
        try:
            return tokenizer_from_gguf(open_gguf(found.path))
        except CheckpointError as error:
            raise DataError(f"{found.path}: {error}") from error
    if not any((found.path / name).exists() for name in TOKENIZER_FILES):
        raise DataError(
            f"{found.label} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} in {found.path}"
        )
    from transformers import AutoTokenizer  # takes seconds where torch is installed

    try:
        return AutoTokenizer.from_pretrained(found.path)
    except Exception as error:  # transformers and its backends fail in many ways on damaged files
        raise DataError(f"the tokenizer in {found.path} cannot be used: {error}") from error
