"""Examples laid into rows of one length: the shape that a compiled step wants.

Packed, a row holds several examples one after the other, each with its own segment id and
positions from 0, so that attention and rotary angles are those that it would have alone. Rows are
filled by best-fit decreasing: the longest example first, each into the fullest row that still has
room. It needs at most 11/9 of the fewest rows plus a constant, as first-fit decreasing does
(Johnson et al. 1974), and with rows kept by free space it is linear in the number of examples.

Unpacked, every example has its row. Either way segment 0 marks padding, whatever id stands there.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from jqlora.data.tokenize import Example
from jqlora.errors import DataError

Batch: TypeAlias = dict[str, np.ndarray]
"""``input_ids``, ``positions``, ``segment_ids`` int32 and ``loss_mask`` bool, each [..., T].

Token ``t + 1`` is predicted at ``t``; it counts where ``loss_mask[t + 1]`` is True, and then both
have the same segment id. Segment ids count from 1 in each row; 0 is padding.
"""


class Rows(Sequence[Batch]):
    """Rows of ``length`` made of examples; a row is assembled when it is asked for.

    ``layout[i]`` lists the examples of row ``i`` in their order. ``fill`` is the share of
    positions that hold a token.
    """

    def __init__(self, examples: Sequence[Example], layout: Sequence[Sequence[int]], length: int):
        self.examples = examples
        self.layout = layout
        self.length = length

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, index) -> Batch:
        return fill_row([self.examples[i] for i in self.layout[index]], self.length)

    @property
    def fill(self) -> float:
        return sum(map(len, self.examples)) / (len(self) * self.length)


def pack(examples: Sequence[Example], length: int) -> Rows:
    """As few rows of ``length`` as best-fit decreasing finds, each example whole and once.

    Raises:
      DataError: no example, or one longer than ``length``.
    """
    _check(examples, length)
    layout: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set where some row has room for exactly r tokens
    for i in sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i)):
        size = len(examples[i])
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
            layout[row].append(i)
        else:
            room, row = length, len(layout)
            layout.append([i])
        rows_by_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return Rows(examples, layout, length)


def pad(examples: Sequence[Example], length: int) -> Rows:
    """One row of ``length`` for each example, in order. Raises as :func:`pack`."""
    _check(examples, length)
    return Rows(examples, [[i] for i in range(len(examples))], length)


def fill_row(examples: Sequence[Example], length: int) -> Batch:
    """One row [T] holding these examples one after the other; none gives a row of padding."""
    row: Batch = {
        "input_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
        "loss_mask": np.zeros(length, np.bool_),
    }
    at = 0
    for segment, example in enumerate(examples, start=1):
        span = slice(at, at + len(example))
        row["input_ids"][span] = example.input_ids
        row["positions"][span] = np.arange(len(example))
        row["segment_ids"][span] = segment
        row["loss_mask"][span] = example.loss_mask
        at += len(example)
    return row


def longest(examples: Sequence[Example], multiple: int = 8) -> int:
    """The least multiple that holds every example."""
    return -(-max(map(len, examples)) // multiple) * multiple


def _check(examples: Sequence[Example], length: int) -> None:
    if not examples:
        raise DataError("there are no examples to put into batches")
    over = next((example for example in examples if len(example) > length), None)
    if over is not None:
        raise DataError(
            f"{over.origin}: {len(over)} tokens do not fit a row of {length}; raise data.length"
        )
