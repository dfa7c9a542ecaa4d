"""What the outputs of a classifier are called, and what kind of problem it answers, as config.json
says it of every family."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from jqlora.models.hf_keys import refuse

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The part of a configuration that a classifier's head follows from."""

    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    def with_labels(self, count: int) -> Self:
        """For a classifier with ``count`` outputs; labels of another number lose their names."""
        return self if count == self.num_labels else replace(self, labels=_unnamed(count))


def read_labels(hf: Mapping[str, Any], absent: int = 2) -> dict[str, Any]:
    """The fields of :class:`Labels`; ``absent`` is how many labels transformers takes there to be
    where the config says nothing."""
    problem = hf.get("problem_type")
    if problem is not None and problem not in PROBLEMS:
        refuse("problem_type", problem, PROBLEMS)
    return {"labels": _names(hf, absent), "problem_type": problem}


def write_labels(config: Labels) -> dict[str, Any]:
    """The keys of config.json that :func:`read_labels` reads."""
    return {
        "id2label": {str(i): label for i, label in enumerate(config.labels)},
        "label2id": {label: i for i, label in enumerate(config.labels)},
        "problem_type": config.problem_type,
    }


def _names(hf: Mapping[str, Any], absent: int) -> tuple[str, ...]:
    names = hf.get("id2label")
    if names is None:
        return _unnamed(hf.get("num_labels") or absent)
    numbered = {int(number): str(label) for number, label in names.items()}
    if sorted(numbered) != list(range(len(numbered))):
        refuse("id2label", names, "labels numbered from 0 without gaps")
    return tuple(numbered[i] for i in range(len(numbered)))


def _unnamed(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))
