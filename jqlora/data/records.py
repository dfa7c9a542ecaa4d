"""One training record, whatever its file called the fields.

Fine-tuning data comes in a handful of habits, told apart by their keys and nothing else, so that a
file never has to declare its format. Where a row carries several (the Alpaca set has a ready-made
``text`` beside its fields) the most structured one wins, in the order of ``FORMATS``:

=====================  ==============================================================
``messages``           ``[{"role": "user", "content": ...}, ...]``, as OpenAI writes it
``conversations``      ``[{"from": "human", "value": ...}, ...]``, as ShareGPT writes it
``instruction``        with ``output`` and maybe ``input`` (Alpaca), or ``response`` and
                       maybe ``context`` (Dolly)
``prompt``             with ``completion`` or ``response``; ``question`` with ``answer``
``text``               plain text, all of which is learned
=====================  ==============================================================
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jqlora.errors import DataError

Kind = Literal["messages", "alpaca", "prompt-completion", "text"]
Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
}
FORMATS = (
    "messages [{role, content}]",
    "conversations [{from, value}]",
    "instruction, output (and input)",
    "prompt, completion",
    "question, answer",
    "text",
)
_PROMPT_COMPLETION = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
_INSTRUCTION = (("input", "output"), ("context", "response"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. ``train`` is False where the file gave an assistant turn ``"weight": 0``."""

    role: Role
    content: str
    train: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One row of a data set; which fields are set depends on ``kind``.

    messages: ``messages``. alpaca: ``prompt`` (the instruction), ``context`` (the input, maybe
    empty), ``completion``. prompt-completion: ``prompt``, ``completion``. text: ``text``.
    ``origin`` is ``file:line`` (a row number for Parquet and ``datasets``). ``expect`` comes from a
    field of that name beside any format: the word that a right answer contains, for measuring
    generated answers. It is never trained on.
    """

    kind: Kind
    origin: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    context: str = ""
    completion: str = ""
    text: str = ""
    expect: str = ""


def parse_record(row: Any, origin: str) -> Record:
    """The record that a decoded row holds.

    Raises:
      DataError: no known format; a field of the wrong type; nothing to learn. Names ``origin``.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: expected an object with named fields, found {_show(row)}")
    row = {name: value for name, value in row.items() if value is not None}
    expect = _text(row, "expect", origin) if "expect" in row else ""
    return dataclasses.replace(_parse(row, origin), expect=expect)


def _parse(row: Mapping[str, Any], origin: str) -> Record:
    for turns in ("messages", "conversations"):
        if turns in row:
            messages = _messages(row[turns], f"{origin}: {turns}")
            if "system" in row and messages[0].role != "system":
                system = Message(role="system", content=_text(row, "system", origin))
                messages = (system, *messages)
            return Record(kind="messages", origin=origin, messages=messages)
    for given, wanted in _INSTRUCTION:
        if "instruction" in row and wanted in row:
            return Record(
                kind="alpaca",
                origin=origin,
                prompt=_text(row, "instruction", origin),
                context=_text(row, given, origin) if given in row else "",
                completion=_text(row, wanted, origin),
            )
    for given, wanted in _PROMPT_COMPLETION:
        if given in row and wanted in row:
            return _prompt_completion(row, given, wanted, origin)
    if "text" in row:
        text = _text(row, "text", origin)
        if not text.strip():
            raise DataError(f"{origin}: text is empty")
        return Record(kind="text", origin=origin, text=text)
    raise DataError(
        f"{origin}: no known format in the fields {sorted(row)}; expected one of: "
        + "; ".join(FORMATS)
    )


def _prompt_completion(row: Mapping[str, Any], given: str, wanted: str, origin: str) -> Record:
    if isinstance(row[given], list | tuple):  # both sides may themselves be conversations
        messages = _messages(row[given], f"{origin}: {given}")
        messages += _messages(row[wanted], f"{origin}: {wanted}")
        return Record(kind="messages", origin=origin, messages=messages)
    return Record(
        kind="prompt-completion",
        origin=origin,
        prompt=_text(row, given, origin),
        completion=_text(row, wanted, origin),
    )


def _messages(turns: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f"{where}: expected a list of turns, found {_show(turns)}")
    return tuple(_message(turn, f"{where}[{i}]") for i, turn in enumerate(turns))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: expected {{role, content}}, found {_show(turn)}")
    role = turn.get("role", turn.get("from"))
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise DataError(f"{where}: tool calls are not supported; write the call as content")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list | tuple):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be text, found {_show(content)}")
    return Message(role=ROLES[role], content=content, train=turn.get("weight") != 0)


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise DataError(f"{where}: only text can be learned, found the content part {_show(part)}")


def _text(row: Mapping[str, Any], name: str, origin: str) -> str:
    if not isinstance(row[name], str):
        raise DataError(f"{origin}: {name} must be text, found {_show(row[name])}")
    return row[name]


def _show(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) < 60 else shown[:57] + '...'}"
