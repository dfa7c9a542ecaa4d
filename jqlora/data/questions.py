"""What a record asks and answers, and when two wordings are the same."""

import unicodedata

from jqlora.data.records import Record


def question(record: Record) -> str:
    """What a record asks: its first user turn, its prompt with its context, or its whole text."""
    if record.kind == "messages":
        return next((m.content for m in record.messages if m.role == "user"), "")
    if record.kind == "text":
        return record.text
    return f"{record.prompt}\n{record.context}"


def answer(record: Record) -> str:
    """What a record answers: its last assistant turn or its completion; empty where it has none."""
    if record.kind == "messages":
        last = record.messages[-1]
        return last.content if last.role == "assistant" else ""
    return record.completion


def says(text: str, short_answer: str) -> bool:
    """Whether a text contains a short answer as whole words, whatever the case and punctuation."""
    return f" {normalize(short_answer)} " in f" {normalize(text)} "


def normalize(text: str) -> str:
    """The words of a text in lower case, one space apart, without punctuation."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() else " " for c in text).split()
    return " ".join(words) or text.strip()
