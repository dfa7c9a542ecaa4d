"""Batches in an order that depends on the seed alone, from any step on.

grain does the ordering: its ``MapDataset`` maps a step number to a batch without running through
the steps before, so that the state of an iterator is one number and resuming costs nothing. Each
epoch is shuffled anew. Batches never cross an epoch's end; the last one of an epoch is filled with
rows of padding (which count for nothing in the loss), so every record is seen exactly once an epoch
and every batch has the same shape.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jqlora.data.packing import Batch, fill_row, longest, pack, pad
from jqlora.data.tokenize import Example
from jqlora.errors import DataError

Draw = Callable[[Batch, np.random.Generator], Batch]
"""``draw(batch, generator)``: the batch, changed by chance."""


class Loader(Iterator[Batch]):
    """Batches ``[batch_size, length]`` up to ``total_steps``, resumable at any of them.

    ``steps_per_epoch`` batches make an epoch; ``rows.fill`` of packed or padded examples says how
    full they are.
    """

    def __init__(self, dataset: Any, rows: Any, steps_per_epoch: int, fingerprint: str):
        import grain

        # the rows are in memory: reader threads would only make the process harder to fork
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._fingerprint = fingerprint
        self.rows = rows
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = len(dataset)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as a small dict that JSON can hold."""
        return {"fingerprint": self._fingerprint, "grain": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position of a loader of the same examples, batches and seed.

        Raises:
          DataError: the state belongs to other data or another order.
        """
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                "the saved position belongs to other data, another tokenizer, or another length, "
                "batch size, packing or seed; resume with what the run was started with"
            )
        self._iterator.set_state(state["grain"])


def make_loader(
    examples: Sequence[Example],
    *,
    batch_size: int,
    length: int | None = None,
    packing: bool = True,
    seed: int = 0,
    epochs: float | None = None,
    steps: int | None = None,
    shuffle: bool = True,
) -> Loader:
    """Batches of ``batch_size`` rows of ``length`` tokens, for so many epochs or steps.

    ``length`` is by default the longest example, rounded up to a multiple of 8. Of ``epochs``
    (which may be a fraction) and ``steps`` exactly one is given.

    Raises:
      DataError: no example, one longer than ``length``, or a number out of its range.
    """
    length = length or (longest(examples) if examples else 1)
    rows = pack(examples, length) if packing else pad(examples, length)

    def stack(members: Sequence[Batch]) -> Batch:
        blank = [fill_row((), length)] * (batch_size - len(members))
        return {name: np.stack([row[name] for row in (*members, *blank)]) for name in members[0]}

    return loader_of(
        rows,
        stack,
        content=_content(examples),
        order=(length, batch_size, packing, seed, shuffle),
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        steps=steps,
        shuffle=shuffle,
    )


def loader_of(
    rows: Sequence[Any],
    stack: Callable[[Sequence[Any]], Batch],
    *,
    content: Iterable[bytes],
    order: tuple[Any, ...],
    batch_size: int,
    seed: int = 0,
    epochs: float | None = None,
    steps: int | None = None,
    shuffle: bool = True,
    draw: Draw | None = None,
) -> Loader:
    """A loader of rows of any kind, of which ``stack`` makes a batch of up to ``batch_size``.

    ``draw`` changes each batch with a generator of its own, which follows from ``seed`` and the
    batch's number alone, so that every epoch is another and a resumed run goes on with the same.
    ``content`` and ``order`` are what a resumed run must have alike. Raises DataError for a number
    out of its range.
    """
    import grain

    if batch_size < 1:
        raise DataError(f"the batch size must be at least 1, not {batch_size}")
    if not 0 <= seed < 2**32:
        raise DataError(f"the seed must be from 0 to 2**32 - 1, not {seed}")
    steps_per_epoch = -(-len(rows) // batch_size)
    total = _total_steps(steps_per_epoch, epochs, steps)
    dataset = grain.MapDataset.source(rows).seed(seed)
    dataset = dataset.shuffle() if shuffle else dataset
    dataset = dataset.batch(batch_size, batch_fn=stack)
    dataset = dataset.repeat(-(-total // steps_per_epoch))[:total]
    if draw is not None:
        dataset = dataset.random_map(draw)
    fingerprint = _fingerprint(content, order)
    return Loader(dataset, rows, steps_per_epoch, fingerprint)


def _total_steps(steps_per_epoch: int, epochs: float | None, steps: int | None) -> int:
    if (epochs is None) == (steps is None):
        raise DataError("give either epochs or steps")
    total = steps if steps is not None else math.ceil((epochs or 0) * steps_per_epoch)
    if total < 1:
        raise DataError(f"epochs={epochs}, steps={steps} leave nothing to train; give more than 0")
    return total


def _fingerprint(content: Iterable[bytes], order: tuple[Any, ...]) -> str:
    digest = hashlib.sha256(repr(order).encode())
    for part in content:
        digest.update(part)
    return digest.hexdigest()[:16]


def _content(examples: Sequence[Example]) -> Iterator[bytes]:
    for example in examples:
        yield len(example).to_bytes(8, "little")
        yield example.input_ids.tobytes()
        yield example.loss_mask.tobytes()
