"""Token ids of a record, and which of them are training targets.

The mask marks *targets*: ``loss_mask[t]`` says that predicting token ``t`` (from those before it)
counts. It is built from the rendered pieces, never by comparing ids, because many tokenizers pad
with the very token that ends a turn, and a model trained with that token masked never stops.

A piece's tokens are found by tokenizing growing prefixes of the text. Where a token would straddle
the end of a prompt, the prompt is tokenized by itself, as it is at generation.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jqlora.data.records import Record
from jqlora.data.template import AUTO, Piece, Template, render, render_prompt
from jqlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completion", "all"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence: ``input_ids`` int32 [n] and ``loss_mask`` bool [n], True at training targets.

    ``loss_mask[0]`` is always False: nothing predicts the first token.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    origin: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        return int(self.loss_mask.sum())


def tokenize(
    record: Record,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: Template = AUTO,
    train_on: TrainOn = "completion",
) -> Example:
    """The whole record, however long, with its target mask.

    Raises:
      DataError: it cannot be rendered, or the tokenizer cannot separate an answer from its prompt.
    """
    rendered = render(record, tokenizer, template)
    ids, mask = [], []
    text = ""
    for piece in rendered.pieces:
        longer = _extend(ids, text, piece, tokenizer, record.origin)
        learned = np.full(len(longer) - len(ids), piece.learn)
        if piece.ends:
            _spare_trailing_space(learned, longer[len(ids) :], tokenizer)
        ids, text = longer, text + piece.text
        mask += learned.tolist()
    if rendered.raw:
        begin, end = _begin(tokenizer), _end(tokenizer, record.origin)
        ids, mask = [*begin, *ids, end], [False] * len(begin) + mask + [rendered.pieces[-1].learn]
    mask_array = np.asarray(mask, np.bool_) | (train_on == "all")
    mask_array[:1] = False
    return Example(np.asarray(ids, np.int32), mask_array, record.origin)


def encode_prompt(
    record: Record, tokenizer: "PreTrainedTokenizerBase", *, template: Template = AUTO
) -> np.ndarray:
    """int32 [n]: what generation starts from, the record without its last answer."""
    rendered = render_prompt(record, tokenizer, template)
    ids = _ids(rendered.pieces[0].text, tokenizer)
    return np.asarray([*(_begin(tokenizer) if rendered.raw else []), *ids], np.int32)


def plain_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """int32 [n]: the tokens of plain text, with a begin-of-sequence token where the tokenizer puts
    one."""
    return np.asarray([*_begin(tokenizer), *_ids(text, tokenizer)], np.int32)


def _extend(
    ids: list[int], text: str, piece: Piece, tokenizer: "PreTrainedTokenizerBase", origin: str
) -> list[int]:
    """Ids of ``text + piece.text`` that begin with ``ids``, those of ``text``."""
    whole = _ids(text + piece.text, tokenizer)
    if whole[: len(ids)] == ids:
        return whole
    apart = ids + _ids(piece.text, tokenizer)
    if tokenizer.decode(apart) != tokenizer.decode(whole):
        raise DataError(
            f"{origin}: the tokenizer joins the characters on both sides of an answer's edge "
            f"({text[-10:]!r} and {piece.text[:10]!r}), so its tokens cannot be told apart; let "
            "the space between them begin the answer and not end the prompt"
        )
    return apart


def _spare_trailing_space(
    learned: np.ndarray, ids: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Generation stops at the end-of-turn token: white space that a template puts behind it is
    never generated, so it is no target."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = max((at for at, i in enumerate(ids) if i in special), default=None)
    if last is not None and not str(tokenizer.decode(ids[last + 1 :])).strip():
        learned[last + 1 :] = False


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _begin(tokenizer: Any) -> list[int]:
    """The begin-of-sequence token, for the tokenizers that put one before plain text."""
    bos = tokenizer.bos_token_id
    first = tokenizer.encode("a")[:1]
    return [bos] if bos is not None and first == [bos] else []


def _end(tokenizer: "PreTrainedTokenizerBase", origin: str) -> int:
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"{origin}: the tokenizer has no end-of-sequence token, without which a model cannot "
            "learn to stop; set tokenizer.eos_token"
        )
    return int(eos)
