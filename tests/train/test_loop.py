"""The loop: what is logged when, and that stopping and going on changes nothing."""

import functools
import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora import optim
from jqlora.errors import NonFiniteLoss
from jqlora.train import TrainState, make_train_step
from jqlora.train.checkpoint import Checkpoints
from jqlora.train.evaluate import Evaluation
from jqlora.train.loop import Every, Trainee, fit, stop_at
from jqlora.train.metrics import WALL_CLOCK, MetricsLog, read_metrics
from jqlora.train.progress import Progress
from tests.train import toy
from tests.train.test_checkpoint import assert_identical

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOTAL = 7
SCHEDULE = optim.cosine(0.05, steps=TOTAL, warmup=2)
TX = optim.adamw(SCHEDULE)
STEP = make_train_step(toy.apply, TX)
PARAMS = toy.init_params(jax.random.key(1))


class Batches:
    """A resumable stream; ``at(step)`` may be told to do something when a batch is fetched."""

    def __init__(self, events=None):
        self.next, self.events = 0, events or {}

    def __next__(self):
        self.next += 1
        batch = toy.make_batch(self.next)
        return self.events.get(self.next, lambda batch: batch)(batch)

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def raise_signal(kind):
    def event(batch):
        os.kill(os.getpid(), kind)
        return batch

    return event


def run(folder, events=None, *, evaluate_every=2, save_every=2, stream=None):
    """Train in ``folder``, going on from what is there."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=3)
    batches = Batches(events)
    state = TrainState.create(toy.init_adapters(jax.random.key(2)), TX, jax.random.key(3))
    restored = checkpoints.restore_latest(state)
    if restored is not None:
        state, position = restored
        batches.set_state(position)
    log = MetricsLog(folder / "metrics.jsonl", through=int(state.step) if restored else None)
    progress = Progress(TOTAL, done=int(state.step), stream=stream or io.StringIO())

    lost = functools.partial(stop_at, folder / "bad_batch.npz")

    def evaluate(state, _):
        total = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(state.adapters))
        return {"heldout": Evaluation(loss=total, tokens=1)}

    try:
        return fit(
            state,
            PARAMS,
            step=STEP,
            batches=batches,
            total_steps=TOTAL,
            every=Every(log=1, evaluate=evaluate_every, save=save_every),
            trainees=[Trainee(log=log, schedule=SCHEDULE, lost=lost)],
            checkpoints=checkpoints,
            progress=progress,
            evaluate=evaluate,
            after_first=lambda: log.write({"step": 0, "kind": "heldout", "loss": 0.0}),
        )
    finally:
        log.close()


def rows(folder):
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in found]


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    return tmp_path / "whole", run(tmp_path / "whole")


def test_each_step_and_evaluation_is_a_row_and_the_last_step_has_all(whole):
    folder, result = whole
    found = [(row["step"], row["kind"]) for row in rows(folder)]
    trained = [(step, "train") for step in range(1, TOTAL + 1)]
    assert [row for row in found if row[1] == "train"] == trained
    assert [row[0] for row in found if row[1] == "heldout"] == [0, 2, 4, 6, 7]
    assert found[:2] == [(1, "train"), (0, "heldout")]
    assert Checkpoints(folder / "checkpoints").steps() == [4, 6, 7]
    assert result.signal is None
    assert result.state.step == TOTAL


def test_the_logged_learning_rate_is_the_one_that_was_used(whole):
    folder, _ = whole
    with jax.numpy_dtype_promotion("standard"):
        expected = [float(jnp.asarray(SCHEDULE(step))) for step in range(TOTAL)]
    found = [row["learning_rate"] for row in rows(folder) if row["kind"] == "train"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(kind, at, whole, tmp_path):
    folder, result = whole
    stopped = run(tmp_path, {at: raise_signal(kind)})
    assert stopped.signal == kind.name
    assert stopped.state.step == at
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == at
    resumed = run(tmp_path)
    assert resumed.signal is None
    assert_identical(resumed.state, result.state)
    assert rows(tmp_path) == rows(folder)


def test_signal_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_stops_at_once(tmp_path):
    both = lambda batch: raise_signal(signal.SIGINT)(raise_signal(signal.SIGINT)(batch))  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {3: both})


def test_a_run_dead_between_checkpoints_goes_on_from_the_last_one(whole, tmp_path):
    folder, result = whole

    def die(batch):
        raise MemoryError

    with pytest.raises(MemoryError):
        run(tmp_path, {6: die})
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4]
    assert_identical(run(tmp_path).state, result.state)
    assert rows(tmp_path) == rows(folder)


def test_a_complete_run_resumed_does_nothing(whole):
    folder, result = whole
    before = (folder / "metrics.jsonl").read_text()
    again = run(folder)
    assert_identical(again.state, result.state)
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_with_the_batch_and_leaves_checkpoints(tmp_path):
    def spoil(batch):
        return batch | {"input_ids": np.full_like(batch["input_ids"], 10**6)}  # NaN embedding

    with pytest.raises(NonFiniteLoss, match=r"step 5 gave loss .*bad_batch\.npz"):
        run(tmp_path, {5: spoil})
    saved = np.load(tmp_path / "bad_batch.npz")
    assert saved["step"] == 5
    assert (saved["input_ids"] == 10**6).all()
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4]
    assert all(row["step"] < 5 for row in rows(tmp_path))


def test_every_line_of_the_log_is_json_with_the_promised_fields(whole):
    folder, _ = whole
    promised = {"loss", "penalty", "grad_norm", "tokens", "learning_rate"} | WALL_CLOCK
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["kind"] != "train" or promised <= row.keys()


def test_without_a_terminal_progress_is_plain_lines(tmp_path):
    stream = io.StringIO()
    run(tmp_path, stream=stream)
    last = next(line for line in stream.getvalue().splitlines() if f"step {TOTAL}/{TOTAL}" in line)
    assert all(word in last for word in ("loss", "tok/s", "peak", "left"))
    assert "\r" not in stream.getvalue()
