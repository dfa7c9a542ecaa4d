"""What ``jqlora eval`` measures: text, documents, tasks with a head, multiple choice.

Each function takes what was opened and returns a dict of numbers that JSON can hold.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jqlora.data import Template, encode_all, make_loader, read_records
from jqlora.data.strided import read_documents, strided
from jqlora.errors import DataError
from jqlora.run.reading import Reading
from jqlora.run.tasks import numbering_of, outputs_of
from jqlora.run.writing import causal_writer
from jqlora.tasks import Task
from jqlora.tasks.choices import (
    Choice,
    Form,
    choice_scores,
    options,
    prompt,
    read_choices,
    shots_by_subject,
)
from jqlora.tasks.likelihood import Asked, encode_asked, make_likelihood
from jqlora.tasks.prompted import prompt_of
from jqlora.tasks.scoring import check_scorable
from jqlora.tasks.summaries import read_summaries
from jqlora.train.evaluate import Evaluation, evaluate, make_eval_step
from jqlora.train.task_loss import loss_for

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model with its adapter, ready to be applied."""

    model: Any
    apply: Callable[..., Any]
    variables: dict[str, Any]
    tokenizer: Any

    def evaluate(self, batches: Any, score: Any = None, outputs: Sequence[str] = ()) -> Evaluation:
        """The loss, and the score of the outputs, over batches."""
        step = make_eval_step(self.apply, loss=loss_for(self.model), outputs=outputs)
        adapters = {name: tree for name, tree in self.variables.items() if name != "params"}
        return evaluate(step, self.variables["params"], adapters, batches, score)


def measure_text(
    opened: Opened,
    source: Any,
    *,
    length: int,
    rows: int,
    train_on: Any,
    too_long: Any,
    template: str,
    say: Say,
) -> dict[str, Any]:
    """``loss``, ``perplexity`` and ``tokens`` of records."""
    examples, report = encode_all(
        read_records(source),
        opened.tokenizer,
        max_length=length,
        train_on=train_on,
        template=Template.parse(template),
        too_long=too_long,
    )
    for line in report.lines():
        say(line)
    length = min(length, -(-report.longest // 8) * 8)
    batches = make_loader(examples, length=length, batch_size=rows, epochs=1, shuffle=False)
    return opened.evaluate(batches).record()


def measure_documents(
    opened: Opened, source: Any, *, length: int, stride: int, rows: int
) -> dict[str, Any]:
    """``loss``, ``perplexity`` and ``tokens`` of whole texts in windows that share all but
    ``stride`` of their tokens; ``bits_per_byte`` over the texts' bytes."""
    documents = read_documents(source)
    windows = [
        window
        for document in documents
        for window in strided(document, opened.tokenizer, length=length, stride=stride)
    ]
    longest = max(map(len, windows))
    batches = make_loader(
        windows, length=longest, batch_size=rows, packing=False, epochs=1, shuffle=False
    )
    found = opened.evaluate(batches)
    octets = sum(len(document.text.encode()) for document in documents)
    bits = found.loss * found.tokens / math.log(2) / octets
    return found.record() | {"bits_per_byte": bits, "documents": len(documents)}


def measure_task(
    opened: Opened,
    task: Task,
    source: Any,
    *,
    length: int,
    stride: int,
    rows: int,
    too_long: str,
    labels: Sequence[str],
    prefix: str,
    target_length: int,
    say: Say,
) -> dict[str, Any]:
    """``loss`` and ``metrics`` of a task's rows, over so many ``labels`` or, of texts that are
    written, ``tokens``; of a task without metrics ``perplexity`` in their place."""
    check_scorable(task)
    reading = Reading(
        task=task,
        tokenizer=opened.tokenizer,
        length=length,
        too_long=too_long,
        stride=stride,
        labels=labels,
        numbering=numbering_of(task, opened.model),
        prefix=prefix,
        target_length=target_length,
    )
    measured, said = reading.measured(source, rows)
    for line in said:
        say(line)
    found = opened.evaluate(measured.batches, measured.score, outputs_of(task.name))
    if not task.metrics:
        return found.record()
    scores, counted = found.metrics, "labels"
    if measured.write is not None:
        scores = measured.write(opened.model, opened.apply, opened.variables)
        counted = "tokens"
    return {"loss": found.loss, "metrics": dict(scores), counted: found.tokens}


def measure_causal_summaries(
    opened: Opened,
    task: Task,
    source: Any,
    *,
    prefix: str,
    length: int,
    rows: int,
    target_length: int,
) -> dict[str, Any]:
    """``metrics`` of what a causal model writes after each text; ``texts`` counts them."""
    check_scorable(task)
    records = read_summaries(task, source)
    prompts = [
        prompt_of(record.document, opened.tokenizer, prefix=prefix, max_length=length)
        for record in records
    ]
    write = causal_writer(
        task,
        prompts,
        [record.summary for record in records],
        tokenizer=opened.tokenizer,
        rows=rows,
        max_new_tokens=target_length,
    )
    scores = write(opened.model, opened.apply, opened.variables)
    return {"metrics": scores, "texts": len(records)}


def measure_choices(
    opened: Opened,
    source: Any,
    shots: Any,
    *,
    count: int,
    form: Form,
    length: int,
    rows: int,
    say: Say,
) -> dict[str, Any]:
    """``metrics`` over all questions and of each of the ``subjects``; ``questions`` counts them.

    Each question is preceded by the first ``count`` of its subject in ``shots``, or by as many as
    leave it within ``length`` tokens. Raises DataError for a question that does not fit alone, and
    for a subject with fewer than ``count`` shots.
    """
    asked = read_choices(source)
    known = shots_by_subject([] if shots is None else read_choices(shots), count)
    few = [one for one in asked if len(known.get(one.subject, ())) < count]
    if few:
        raise DataError(
            f"{few[0].origin}: the subject {few[0].subject!r} has {len(known[few[0].subject])} of "
            f"{count} answered questions to begin with; name them by --shots-data, or --shots 0"
        )
    encoded, shortened = [], 0
    for one in asked:
        made, used = _fitting(one, known[one.subject], form, opened.tokenizer, length)
        encoded.append(made)
        shortened += used < count
    if shortened:
        say(f"{shortened} of {len(asked)} questions have fewer than {count} shots, to fit {length}")
    likelihood = make_likelihood(opened.apply, rows=rows, length=length)
    found = likelihood(opened.variables, encoded)
    subjects = {}
    for subject in dict.fromkeys(one.subject for one in asked):
        at = [i for i, one in enumerate(asked) if one.subject == subject]
        subjects[subject] = choice_scores([asked[i] for i in at], [found[i] for i in at], form)
        subjects[subject]["questions"] = len(at)
    return {
        "metrics": choice_scores(asked, found, form),
        "questions": len(asked),
        "shots": count,
        "form": form,
        "subjects": subjects,
    }


def _fitting(
    one: Choice, shots: Sequence[Choice], form: Form, tokenizer: Any, length: int
) -> tuple[Asked, int]:
    """The question after as many shots as leave it within ``length``, and their number."""
    for count in range(len(shots), -1, -1):
        made = encode_asked(prompt(one, shots[:count], form), options(one, form), tokenizer)
        if made.longest <= length:
            return made, count
    raise DataError(f"{one.origin}: the question alone has more than {length} tokens")


def shown(found: dict[str, Any]) -> list[str]:
    """The numbers in lines for a person."""
    if "metrics" not in found:
        more = f"  bits/byte {found['bits_per_byte']:.4f}" if "bits_per_byte" in found else ""
        head = f"loss {found['loss']:.5f}  perplexity {found['perplexity']:.3f}"
        return [f"{head}  tokens {found['tokens']}{more}"]
    lines = [f"{name} {value:.4f}" for name, value in found["metrics"].items()]
    counted = next(name for name in ("labels", "questions", "texts", "tokens") if name in found)
    if "loss" in found:
        lines.append(f"loss {found['loss']:.5f}")
    return [*lines, f"{counted} {found[counted]}"]


def finite(found: Any) -> Any:
    """The numbers as JSON has them: what is not finite is null."""
    if isinstance(found, dict):
        return {name: finite(value) for name, value in found.items()}
    return found if not isinstance(found, float) or np.isfinite(found) else None
