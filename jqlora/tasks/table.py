"""All tasks, a row for each: what its columns are called, what its labels mean, what it is scored
by.

GLUE (Wang et al. 2019) is written in two ways: as the tab-separated files of its own site, and as
data sets on the hub whose columns have other names. A row lists the columns of both, so that any
file with one of these sets of columns is read, whatever its suffix.
"""

import dataclasses
from typing import Literal

from jqlora.errors import ConfigError
from jqlora.tree import nearest

Kind = Literal["labels", "tags", "masked", "spans", "choices", "texts"]
Columns = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    ``kind``: texts with *labels*, words with *tags*, texts of which some tokens are *masked*,
    *spans* of a text that answer a question, *choices* of which one is likeliest, *texts* that are
    written to a text. ``head`` is the task of the model that serves
    it. ``texts`` are the sets of columns of which the first that a row has is read, ``label`` the
    names of the label's column.
    ``labels`` name the classes in the order of their numbers: none where the user says them.
    ``number`` says that the label is a number (regression). ``headless`` names the columns of a
    tab-separated file without a header line. ``metrics`` are those that papers report.
    """

    name: str
    kind: Kind = "labels"
    head: str = "sequence-classification"
    texts: tuple[Columns, ...] = ()
    label: Columns = ("label",)
    labels: tuple[str, ...] = ()
    number: bool = False
    headless: Columns = ()
    metrics: tuple[str, ...]

    @property
    def has_labels(self) -> bool:
        """Whether its head has as many outputs as there are labels."""
        return self.kind in ("labels", "tags")

    @property
    def num_labels(self) -> int | None:
        """Outputs of its head; None where the user says how many."""
        if not self.has_labels:
            return None
        return 1 if self.number else len(self.labels) or None


_ENTAILED = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_TAGS = ("precision", "recall", "f1", "accuracy")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            texts=(("sentence",),),
            labels=("unacceptable", "acceptable"),
            headless=("source", "label", "judgement", "sentence"),
            metrics=("matthews_correlation",),
        ),
        Task(
            name="sst2",
            texts=(("sentence",),),
            labels=("negative", "positive"),
            metrics=("accuracy",),
        ),
        Task(
            name="mrpc",
            texts=(_PAIR, ("#1 String", "#2 String")),
            label=("label", "Quality"),
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
        ),
        Task(
            name="qqp",
            texts=(("question1", "question2"),),
            label=("label", "is_duplicate"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
        ),
        Task(
            name="qnli",
            texts=(("question", "sentence"),),
            labels=_ENTAILED,
            metrics=("accuracy",),
        ),
        Task(name="rte", texts=(_PAIR,), labels=_ENTAILED, metrics=("accuracy",)),
        Task(
            name="wnli",
            texts=(_PAIR,),
            labels=("not_entailment", "entailment"),
            metrics=("accuracy",),
        ),
        Task(
            name="mnli",
            texts=(("premise", "hypothesis"), _PAIR),
            label=("label", "gold_label"),
            labels=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
        ),
        Task(
            name="stsb",
            texts=(_PAIR,),
            label=("label", "score"),
            number=True,
            metrics=("pearson", "spearman"),
        ),
        # anything else in columns of these names
        Task(
            name="classification",
            texts=(_PAIR, ("premise", "hypothesis"), ("text",), ("sentence",)),
            metrics=("accuracy", "macro_f1", "matthews_correlation"),
        ),
        Task(
            name="regression",
            texts=(_PAIR, ("premise", "hypothesis"), ("text",), ("sentence",)),
            label=("label", "score"),
            number=True,
            metrics=("pearson", "spearman"),
        ),
        Task(
            name="conll2003",
            kind="tags",
            head="token-classification",
            texts=(("tokens",),),
            label=("ner_tags", "tags"),
            labels=("O", *(f"{at}-{of}" for of in ("PER", "ORG", "LOC", "MISC") for at in "BI")),
            metrics=_TAGS,
        ),
        Task(
            name="token_classification",
            kind="tags",
            head="token-classification",
            texts=(("tokens",),),
            label=("ner_tags", "pos_tags", "chunk_tags", "tags", "labels"),
            metrics=_TAGS,
        ),
        Task(name="masked_lm", kind="masked", head="masked-lm", texts=(("text",),), metrics=()),
        Task(
            name="squad",
            kind="spans",
            head="question-answering",
            metrics=("exact_match", "f1"),
        ),
        Task(
            name="squad_v2",
            kind="spans",
            head="question-answering",
            metrics=("exact_match", "f1"),
        ),
        Task(
            name="summarization",
            kind="texts",
            head="seq2seq-lm",
            texts=(
                ("document", "summary"),  # XSum
                ("article", "highlights"),  # CNN/DailyMail
                ("dialogue", "summary"),  # SAMSum
                ("text", "summary"),
                ("prompt", "completion"),
            ),
            metrics=("rouge1", "rouge2", "rougeL", "rougeLsum"),
        ),
        Task(
            name="mmlu",
            kind="choices",
            head="causal-lm",
            metrics=("accuracy", "accuracy_per_character", "accuracy_per_byte"),
        ),
    )
}


def task_named(name: str) -> Task:
    """The row of this name; ConfigError with the nearest names if there is none."""
    if name not in TASKS:
        close = nearest(name, TASKS) or list(TASKS)
        raise ConfigError(
            f"{name!r} is not a task; nearest: {', '.join(close)}; known: {', '.join(TASKS)}"
        )
    return TASKS[name]
