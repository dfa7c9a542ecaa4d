"""What every optimizer must do, one row each: learn, compile once, resume exactly, keep dtypes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora import optim
from jqlora.optim.residence import decided, is_undecided, marked, residence
from jqlora.train import TrainState, make_train_step
from jqlora.train.checkpoint import Checkpoints
from tests.train import toy

pytestmark = pytest.mark.usefixtures("compile_quickly")

STEPS, SAVED_AT = 24, 5
WIDTH, RANK, VOCABULARY = 64, 72, toy.VOCABULARY


@dataclasses.dataclass(frozen=True)
class Row:
    """``make(learning_rate)`` is the optimizer; ``peak`` a rate at which it learns the toy;
    ``device_bytes`` the memory that ``offload="auto"`` is told to have, ``moved`` whether moments
    live on the host after it has decided; ``dtype`` is the adapters'."""

    make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    peak: float = 0.02
    device_bytes: int | None = None
    moved: bool = False
    dtype: jnp.dtype = jnp.float32


def as_room_allows(rate):
    """What ``adamw(offload="auto")`` is made of, for arrays as small as the toy's."""
    moments = optim.offload(optax.scale_by_adam(), page_bytes=1024, smallest=4096)
    return optax.chain(moments, optax.scale_by_learning_rate(rate), marked(open=True))


TABLE = {
    "adamw": Row(optim.adamw),
    "adamw with decay, unclipped": Row(
        lambda rate: optim.adamw(rate, weight_decay=0.1, max_grad_norm=None)
    ),
    "adamw in 8 bits": Row(lambda rate: optim.adamw(rate, bits=8)),
    "lion": Row(optim.lion, peak=0.005),
    "lion in 8 bits": Row(lambda rate: optim.lion(rate, bits=8, weight_decay=0.1), peak=0.005),
    "sgd": Row(optim.sgd, peak=1.0),
    "sgd with momentum": Row(lambda rate: optim.sgd(rate, momentum=0.9), peak=0.5),
    "adafactor": Row(optim.adafactor),
    "adamw on the host": Row(lambda rate: optim.adamw(rate, offload="all")),
    "adamw as room allows": Row(lambda rate: optim.adamw(rate, offload="auto")),
    "adamw in pages, with room": Row(as_room_allows, device_bytes=2**30),
    "adamw in pages, without room": Row(as_room_allows, device_bytes=1000, moved=True),
    "adamw of bf16": Row(optim.adamw, dtype=jnp.bfloat16),
    "adamw in 8 bits of bf16, in pages on the host": Row(
        lambda rate: optax.chain(
            optim.offload(optim.eight_bit(optax.scale_by_adam()), page_bytes=1024, smallest=4096),
            optax.scale_by_learning_rate(rate),
        ),
        moved=True,
        dtype=jnp.bfloat16,
    ),
    "adamw in 16 bits of bf16": Row(
        lambda rate: optim.adamw(rate, bits=16, weight_decay=0.1), dtype=jnp.bfloat16
    ),
    "LoRA-FA on the host": Row(lambda rate: optim.lora_fa(optim.lion(rate, offload="all")), 0.005),
    "LoRA+": Row(lambda rate: optim.lora_plus(optim.adamw(rate), ratio=4), peak=0.005),
    "LoRA-FA": Row(lambda rate: optim.lora_fa(optim.adamw(rate, weight_decay=0.1))),
    "LoRA+ of LoRA-FA in 8 bits": Row(
        lambda rate: optim.lora_plus(optim.lora_fa(optim.adamw(rate, bits=8)), ratio=2), peak=0.01
    ),
}


def init_params():
    embed, head = jax.random.split(jax.random.key(0))
    return {
        "embed": jax.random.normal(embed, (VOCABULARY, WIDTH)),
        "head": jax.random.normal(head, (WIDTH, VOCABULARY)) / 8,
    }


def init_adapters(dtype=jnp.float32):
    """``a`` has 4,608 elements, enough for 8-bit moments; ``b`` has too few."""
    a = jax.random.normal(jax.random.key(1), (WIDTH, RANK), dtype) / 8
    return {"lora": {"head": {"a": a, "b": jnp.zeros((RANK, VOCABULARY), dtype)}}}


@dataclasses.dataclass
class Trained:
    losses: list[float]
    states: dict[int, TrainState]
    traces: int
    compilations: int
    resume: Callable[[TrainState], TrainState]


def copied(tree):
    """The same arrays where they are, out of reach of the donation."""
    return jax.tree.map(jnp.copy, tree)


def train(row: Row) -> Trained:
    traces = 0

    def apply(*args, **kwargs):
        nonlocal traces
        traces += 1
        return toy.apply(*args, **kwargs)

    tx = row.make(optim.cosine(row.peak, steps=2 * STEPS, warmup=2))
    params = init_params()
    step = make_train_step(apply, tx, device_bytes=row.device_bytes)
    batches = [toy.make_batch(seed=0) for _ in range(STEPS)]

    def go_on(state, losses, states):
        while int(state.step) < STEPS:
            state, metrics = step(state, params, batches[int(state.step)])
            losses.append(float(metrics["loss"]))
            if int(state.step) == SAVED_AT:
                states[SAVED_AT] = copied(state)
        return state

    losses, states = [], {}
    adapters = init_adapters(row.dtype)
    states[STEPS] = go_on(TrainState.create(adapters, tx, jax.random.key(7)), losses, states)
    states[0] = TrainState.create(adapters, tx, jax.random.key(7))
    return Trained(
        losses, states, traces, step._cache_size(), lambda state: go_on(copied(state), [], {})
    )


@pytest.fixture(scope="module", params=TABLE.values(), ids=TABLE.keys())
def row(request):
    return request.param


@pytest.fixture(scope="module")
def trained(row):
    return train(row)


def assert_identical(left, right):
    """The same bits; in the same memory as well, but where a step has yet to decide on it."""
    settled = not (is_undecided(left.opt_state) or is_undecided(right.opt_state))

    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        assert not settled or x.sharding.memory_kind == y.sharding.memory_kind
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, decided(left), decided(right))


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_it_learns(trained):
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert np.isfinite(trained.losses).all()


def test_adapters_keep_their_dtype(row, trained):
    found = jax.tree.leaves(trained.states[STEPS].adapters)
    assert {leaf.dtype for leaf in found} == {jnp.dtype(row.dtype)}


def test_the_step_is_traced_and_compiled_once(trained):
    assert (trained.traces, trained.compilations) == (1, 1)


def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_did(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(trained.states[SAVED_AT], {})
    restored = checkpoints.restore_latest(trained.states[0])
    assert restored is not None
    assert_identical(restored[0], trained.states[SAVED_AT])
    assert_identical(trained.resume(restored[0]), trained.states[STEPS])
    assert trained.compilations == 1


def test_state_is_moved_only_where_it_has_to_be(row, trained):
    assert (residence(trained.states[STEPS].opt_state).host > 0) == row.moved
    assert not is_undecided(trained.states[STEPS].opt_state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_and_state_keep_their_dtypes(row, dtype):
    tx, params = row.make(0.1), init_adapters(dtype)
    before = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, after = tx.update(jax.tree.map(jnp.ones_like, params), before, params)
    assert kinds(updates) == kinds(params)
    assert kinds(before) == kinds(after)


def test_extra_arguments_are_accepted(row):
    tx, params = row.make(0.1), init_adapters()
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optax.with_extra_args_support(tx).update(
            params, tx.init(params), params, value=jnp.zeros(()), epoch=3
        )
    assert jax.tree.structure(updates) == jax.tree.structure(params)
