"""Entities in sequences of tags, and how many of them were found.

As the evaluation of CoNLL-2000 and 2003 reads tags (its script ``conlleval``; Tjong Kim Sang and
De Meulder 2003): ``O``, or a place and a type, such as ``B-PER``. An entity goes from where a tag
begins one to where the next begins or none continues. It begins at a place B or S, after O or a
place E or S, and where the type changes; so sequences in IOB1, IOB2, IOE and IOBES are read alike,
broken ones included. It is found where begin, end and type are right.
"""

from collections.abc import Sequence

OUTSIDE = "O"


def is_of_entity(tag: str) -> bool:
    """Whether this is a tag of entities, as against a part of speech."""
    return tag == OUTSIDE or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2)


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """``(first, last, type)`` of each entity.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [(0, 1, 'PER'), (3, 3, 'LOC'), (4, 4, 'LOC')]
    """
    found: list[tuple[int, int, str]] = []
    before, kind_before = OUTSIDE, ""
    for i, tag in enumerate(tags):
        place, _, kind = tag.partition("-")
        begins = place in "BS" or before in "OES" or kind != kind_before
        if place != OUTSIDE and begins:
            found.append((i, i, kind))
        elif place != OUTSIDE:
            found[-1] = (found[-1][0], i, kind)
        before, kind_before = place, kind
    return set(found)


def entity_scores(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """``precision``, ``recall`` and ``f1`` over the entities of all sequences; 0 where there are
    none to divide by."""
    right = found = wanted = 0
    for tags, guesses in zip(true, predicted, strict=True):
        mine, theirs = entities(guesses), entities(tags)
        right, found, wanted = right + len(mine & theirs), found + len(mine), wanted + len(theirs)
    return {
        "precision": right / max(found, 1),
        "recall": right / max(wanted, 1),
        "f1": 2 * right / max(found + wanted, 1),
    }
