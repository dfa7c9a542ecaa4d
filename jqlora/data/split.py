"""Held-out records that ask nothing which training has asked.

Two records with the same question and different answers, or the same row twice, would make a
held-out loss measure memory. So records are grouped by their question, compared without case,
punctuation and spacing, and whole groups are held out.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jqlora.data.questions import normalize, question
from jqlora.data.records import Record
from jqlora.errors import DataError


def hold_out(
    records: Sequence[Record], share: float, *, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, both in file order, with no question in common.

    About ``share`` of the records is held out, and at least one; which, the seed decides.

    Raises:
      DataError: ``share`` outside (0, 1), or fewer than two different questions.
    """
    if not 0 < share < 1:
        raise DataError(f"the held-out share must lie between 0 and 1, not {share}")
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(normalize(question(record)), []).append(i)
    if len(groups) < 2:
        raise DataError(
            f"{len(records)} records ask {len(groups)} different question: nothing can be held out"
        )
    names = list(groups)
    held: set[int] = set()
    for at in np.random.default_rng(seed).permutation(len(names))[:-1]:
        if len(held) >= max(1, round(share * len(records))):
            break
        held.update(groups[names[at]])
    train = [record for i, record in enumerate(records) if i not in held]
    return train, [records[i] for i in sorted(held)]


def shared_questions(train: Iterable[Record], held_out: Iterable[Record]) -> list[str]:
    """Origins of the held-out records whose question training asks too."""
    asked = {normalize(question(record)) for record in train}
    return [r.origin for r in held_out if normalize(question(r)) in asked]
