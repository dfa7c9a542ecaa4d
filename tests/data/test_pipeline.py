"""The order of batches depends on the seed alone and goes on from wherever it stopped."""

import hashlib
import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from jqlora.data import Example, make_loader
from jqlora.errors import DataError

LENGTH = 16


def make_examples(count=23):
    rng = np.random.default_rng(5)
    lengths = rng.integers(2, LENGTH + 1, count)
    return [Example(np.full(n, i + 1, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths)]


def loader(**options):
    settings = {"length": LENGTH, "batch_size": 3, "packing": False, "seed": 1, "epochs": 2}
    return make_loader(make_examples(), **(settings | options))


def ids(batches):
    return [batch["input_ids"].tolist() for batch in batches]


def digest(batches):
    """What a batch holds, down to the bytes of every array."""
    sha = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            sha.update(batch[name].tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 7, 8, 9, 15, 16])
def test_a_new_loader_goes_on_from_a_saved_position(packing, stop):
    options = {"packing": packing, "steps": 17, "epochs": None}
    first = loader(**options)
    list(islice(first, stop))
    state = json.loads(json.dumps(first.get_state()))
    second = loader(**options)
    second.set_state(state)
    rest = list(second)
    assert len(rest) == 17 - stop
    assert digest(rest) == digest(first) == digest(list(islice(loader(**options), stop, None)))


def test_going_back_to_a_position_repeats_what_followed():
    one = loader()
    next(one)
    state = one.get_state()
    after = ids(one)
    one.set_state(state)
    assert ids(one) == after


def test_a_run_that_is_made_longer_goes_on_in_the_same_order():
    short, long = loader(epochs=1), loader(epochs=3)
    list(short)
    long.set_state(short.get_state())
    assert ids(long) == ids(loader(epochs=3))[short.steps_per_epoch :]


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"batch_size": 4}, {"packing": True}, {"length": 32}, {"shuffle": False}],
)
def test_a_position_in_another_order_is_refused(change):
    with pytest.raises(DataError, match="the saved position belongs to other data"):
        loader(**change).set_state(loader().get_state())


def test_a_position_in_other_data_is_refused():
    other = make_examples()
    other[4].input_ids[0] += 1
    options = {"length": LENGTH, "batch_size": 3, "packing": False, "seed": 1, "epochs": 2}
    with pytest.raises(DataError, match="the saved position belongs to other data"):
        make_loader(other, **options).set_state(loader().get_state())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 23, 40])
def test_each_epoch_holds_every_example_once_in_equal_shapes(packing, batch_size):
    one = loader(packing=packing, batch_size=batch_size, epochs=3)
    assert one.total_steps == 3 * one.steps_per_epoch
    for _ in range(3):
        epoch = list(islice(one, one.steps_per_epoch))
        assert {batch["input_ids"].shape for batch in epoch} == {(batch_size, LENGTH)}
        seen = [
            (int(batch["input_ids"][where]), int(batch["positions"][where]))
            for batch in epoch
            for where in zip(*np.nonzero(batch["segment_ids"]), strict=True)
        ]
        assert sorted(seen) == [
            (i + 1, t) for i, e in enumerate(make_examples()) for t in range(len(e))
        ]
    with pytest.raises(StopIteration):
        next(one)


def test_the_rows_that_fill_the_last_batch_hold_no_target():
    last = list(loader(batch_size=22, epochs=1))[-1]
    assert (last["segment_ids"].max(axis=1) > 0).sum() == 1
    assert last["loss_mask"].sum() == (last["segment_ids"] > 0).sum()


def test_epochs_and_seeds_differ_in_order():
    one = loader()
    first, second = ids(islice(one, one.steps_per_epoch)), ids(one)
    assert first != second
    assert first != ids(loader(seed=2, epochs=1))
    assert first == ids(loader(epochs=1))


def test_without_shuffling_the_order_is_the_files():
    rows = [row for batch in loader(shuffle=False, epochs=1) for row in batch["input_ids"]]
    assert [row[0] for row in rows[:23]] == list(range(1, 24))


def test_epochs_may_be_a_fraction_and_steps_override_them():
    assert loader(epochs=0.5).total_steps == 4  # half of ceil(23 / 3) = 8
    assert loader(epochs=None, steps=11).total_steps == 11
    assert len(list(loader(epochs=None, steps=11))) == 11


def test_the_length_is_by_default_that_of_the_longest_example():
    longest = max(map(len, make_examples()))
    assert next(loader(length=None))["input_ids"].shape == (3, -(-longest // 8) * 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"epochs": None}, "either epochs or steps"),
        ({"steps": 3}, "either epochs or steps"),
        ({"epochs": 0}, "leave nothing to train"),
        ({"length": 4}, "do not fit a row of 4"),
    ],
)
def test_numbers_out_of_range_are_errors(options, message):
    with pytest.raises(DataError, match=message):
        loader(**options)


def test_no_examples_are_an_error():
    with pytest.raises(DataError, match="no examples"):
        make_loader([], batch_size=2, epochs=1)


def test_another_process_sees_the_same_batches():
    code = (
        "from tests.data.test_pipeline import digest, loader\n"
        "print(digest(loader(packing=True)), digest(loader()))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert printed == [digest(loader(packing=True)), digest(loader())]


def test_importing_the_data_room_brings_in_no_heavy_reader():
    code = "import sys, jqlora.data; print({'datasets', 'pyarrow', 'torch'} & set(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "set()"
