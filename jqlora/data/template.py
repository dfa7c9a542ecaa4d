"""From a record to the text that a model reads, with what it must write marked.

A conversation is rendered by the tokenizer's own chat template, so that training sees the very
characters that generation will. What the model must learn is what generation leaves to it: for
each assistant turn, the text between the prompt that generation would see (the turns before, with
``add_generation_prompt``) and the end of that turn. Finding that text by rendering prefixes works
for any template whose renderings grow at the end only; one that rewrites earlier turns is refused,
because then no mask would be right. (The alternative, the ``{% generation %}`` marks of some
templates, is missing from most published ones.)

Records of the other formats become a prompt and a completion, ended by the end-of-sequence token.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jinja2

from jqlora.data.records import Message, Record
from jqlora.errors import DataError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["auto", "chat", "alpaca", "plain"]

# The prompts of Taori et al. 2023 (Stanford Alpaca), with a line break after "Response:".
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """How records become text.

    ``style``: *chat*, everything but text through the chat template; *alpaca*, the Alpaca prompt;
    *plain*, prompt and completion one after the other; *auto*, chat for messages, chat or else
    alpaca for Alpaca records, plain for the rest. ``jinja`` replaces the tokenizer's template.
    """

    style: Style = "auto"
    jinja: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Template":
        """``auto``, ``chat``, ``alpaca``, ``plain``, or the path of a Jinja file.

        Raises:
          DataError: not one of these names and not a ``.jinja`` file.
          SourceError: the file cannot be read.
        """
        if name in ("auto", "chat", "alpaca", "plain"):
            return cls(style=name)
        if not name.endswith((".jinja", ".jinja2", ".j2")):
            raise DataError(
                f"template {name!r} is not one of auto, chat, alpaca, plain, nor a .jinja file"
            )
        try:
            return cls(style="auto", jinja=Path(name).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise SourceError(f"template {name}: {error.strerror}") from error


AUTO = Template()


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a rendered record: its text, and whether the model is to learn it.

    ``ends`` marks a piece after which generation stops, so that white space behind the
    end-of-turn token is the template's and not the model's.
    """

    text: str
    learn: bool
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A record as text in pieces. ``raw`` text takes the tokenizer's begin and end tokens; a
    conversation has whatever of them its template wrote."""

    pieces: tuple[Piece, ...]
    raw: bool


def render(record: Record, tokenizer: "PreTrainedTokenizerBase", template: Template) -> Rendered:
    """The record's text in pieces, alternately not learned and learned.

    Raises:
      DataError: the tokenizer has no chat template and the record needs one; the template refuses
        the record, or rewrites earlier turns; the style does not fit the record.
    """
    style = _style(record, tokenizer, template)
    if record.kind == "text":
        return Rendered((Piece(record.text, learn=True),), raw=True)
    if style == "chat":
        return Rendered(_chat(_as_messages(record), record.origin, tokenizer, template), raw=False)
    prompt, completion = _as_pair(record)
    if style == "alpaca":
        form = ALPACA_WITH_INPUT if record.context else ALPACA
        prompt = form.format(prompt=prompt, context=record.context)
    elif record.context:
        prompt = f"{prompt}\n{record.context}"
    learn = record.kind != "messages" or record.messages[-1].train
    return Rendered((Piece(prompt, learn=False), Piece(completion, learn=learn)), raw=True)


def render_prompt(
    record: Record, tokenizer: "PreTrainedTokenizerBase", template: Template
) -> Rendered:
    """What generation is given: everything before the record's last answer, which is ignored.

    A conversation may also end with the question. Raises as :func:`render` does.
    """
    if record.kind == "text":
        return Rendered((Piece(record.text, learn=False),), raw=True)
    messages = _as_messages(record)
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    if _style(record, tokenizer, template) == "chat":
        text = _apply(messages, True, record.origin, tokenizer, template)
        return Rendered((Piece(text, learn=False),), raw=False)
    if record.kind == "messages":
        blank = Message(role="assistant", content="")
        record = dataclasses.replace(record, messages=(*messages, blank))
    return Rendered(render(record, tokenizer, template).pieces[:1], raw=True)


def _style(record: Record, tokenizer: "PreTrainedTokenizerBase", template: Template) -> Style:
    has_chat = bool(template.jinja or tokenizer.chat_template)
    style = template.style
    if style == "auto":
        by_kind: dict[str, Style] = {
            "messages": "chat",
            "alpaca": "chat" if has_chat else "alpaca",
        }
        style = by_kind.get(record.kind, "plain")
    elif record.kind == "text" and style != "plain":
        raise DataError(f"{record.origin}: plain text has no turns for the template {style!r}")
    if style == "chat" and not has_chat:
        raise DataError(
            f"{record.origin}: the tokenizer has no chat template for this conversation; set "
            "data.template to a .jinja file or to 'alpaca', or use prompt and completion fields"
        )
    if style == "plain" and record.kind == "messages":
        raise DataError(
            f"{record.origin}: the template 'plain' joins a prompt and a completion, and this is "
            "a conversation; use the template 'chat' or 'alpaca'"
        )
    return style


def _as_messages(record: Record) -> tuple[Message, ...]:
    if record.kind == "messages":
        return record.messages
    question = "\n\n".join(part for part in (record.prompt, record.context) if part)
    return (
        Message(role="user", content=question),
        Message(role="assistant", content=record.completion),
    )


def _as_pair(record: Record) -> tuple[str, str]:
    if record.kind != "messages":
        return record.prompt, record.completion
    roles = [message.role for message in record.messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"{record.origin}: the template 'alpaca' holds one question and one answer, and this "
            f"conversation has the turns {', '.join(roles)}"
        )
    return record.messages[0].content, record.messages[1].content


def _chat(
    messages: Sequence[Message],
    origin: str,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
) -> tuple[Piece, ...]:
    if messages[0].role == "assistant":
        raise DataError(f"{origin}: the first turn is the assistant's; a question must precede it")
    whole = _apply(messages, False, origin, tokenizer, template)
    pieces: list[Piece] = []
    done = 0

    def take(end_text: str, learn: bool, turn: int) -> None:
        nonlocal done
        if len(end_text) < done or not whole.startswith(end_text):
            raise DataError(
                f"{origin}: the chat template rewrites earlier text when turn {turn + 1} is added, "
                "so the answers cannot be told apart; set data.template to a .jinja file that only "
                "appends, or make each answer a record of its own"
            )
        pieces.append(Piece(whole[done : len(end_text)], learn=learn, ends=learn))
        done = len(end_text)

    for turn, message in enumerate(messages):
        if message.role == "assistant" and message.train:
            take(_apply(messages[:turn], True, origin, tokenizer, template), False, turn)
            take(_apply(messages[: turn + 1], False, origin, tokenizer, template), True, turn)
    if done < len(whole):
        pieces.append(Piece(whole[done:], learn=False))
    return tuple(pieces)


def _apply(
    messages: Sequence[Message],
    prompt: bool,
    origin: str,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=template.jinja,
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise DataError(f"{origin}: the chat template refuses this record: {error}") from error
    return str(text)
