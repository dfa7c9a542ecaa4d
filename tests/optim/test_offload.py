"""State on the host: the same numbers, where it lives through a run, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora import optim
from jqlora.errors import ConfigError
from jqlora.optim.offload import DEVICE, on_host, pages
from jqlora.optim.residence import planned, planned_residence, residence
from jqlora.train import TrainState, make_train_step
from jqlora.train.checkpoint import Checkpoints
from tests.train import toy
from tests.train.compilations import compilations

LAYERS, WIDTH, RANK = 6, 16, 4
RATE = optim.cosine(0.01, steps=20, warmup=2)


@pytest.fixture(autouse=True)
def loose_promotion():
    """optax mixes integer counts and floats; ``make_train_step`` allows it the same."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def stack(key=0):
    a, b, head, bias = jax.random.split(jax.random.key(key), 4)
    return {
        "lora": {
            "layers": {
                "a": jax.random.normal(a, (LAYERS, WIDTH, RANK)),
                "b": jax.random.normal(b, (LAYERS, RANK, 32)),
            }
        },
        "full": {
            "head": {"kernel": jax.random.normal(head, (WIDTH, 24))},
            "norm": {"scale": jax.random.normal(bias, (WIDTH,))},
        },
    }


def away(direction, **options):
    return optim.offload(direction, page_bytes=2 * 4 * WIDTH * RANK, smallest=300, **options)


DIRECTIONS = {
    "adam": optax.scale_by_adam,
    "lion": optax.scale_by_lion,
    "momentum": lambda: optax.trace(0.9),
    "adam in 8 bits": lambda: optim.eight_bit(optax.scale_by_adam(), smallest=256),
    "adam and decay": lambda: optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(0.1, mask=optim.decayed)
    ),
    "two groups": lambda: optax.partition(
        {True: optax.scale_by_adam(), False: optax.trace(0.9)}, optim.decayed
    ),
}


def run(tx, place=lambda state: state, rounds=5):
    """Parameters and state after some updates, each compiled."""
    params = stack()
    state, update = place(tx.init(params)), jax.jit(tx.update, donate_argnums=(0, 1))
    for number in range(rounds):
        updates, state = update(stack(number + 1), state, params)
        params = jax.tree.map(jnp.add, params, jax.tree.map(lambda u: 0.01 * u, updates))
    return params, state


def assert_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module", params=DIRECTIONS.values(), ids=DIRECTIONS.keys())
def runs(request):
    with jax.numpy_dtype_promotion("standard"):
        make = request.param
        moved = run(
            away(make()), lambda state: jax.tree.map(lambda x: jax.device_put(x, DEVICE), state)
        )
        return run(make()), run(away(make())), moved


def test_where_the_state_lives_does_not_change_a_bit(runs):
    _, host, device = runs
    assert_identical(host, device)


def test_paging_is_the_plain_optimizer(runs):
    """Its moments bit for bit; its updates but for where XLA puts Adam's divisions."""
    (params, state), (found, paged), _ = runs
    assert_identical(state, paged)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), found, params)


@pytest.mark.parametrize("make", [optax.scale_by_lion, lambda: optax.trace(0.9)])
def test_paging_is_bit_for_bit_the_plain_optimizer_where_nothing_divides(make):
    assert_identical(run(make()), run(away(make())))


def test_large_moments_stay_on_the_host_and_small_ones_on_the_device(runs):
    _, (_, host), (_, device) = runs
    for leaf in jax.tree.leaves(host):
        assert on_host(leaf) == (leaf.size >= 300)
    assert residence(host).host > residence(host).device
    assert residence(device).host == 0


@pytest.mark.parametrize("make", DIRECTIONS.values(), ids=DIRECTIONS.keys())
def test_where_the_state_will_live_is_known_before_there_is_any(make):
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stack())
    found = away(make()).init(stack())
    shapes, places = planned(away(make()).init, params)
    assert planned_residence(shapes, places) == residence(found)
    assert jax.tree.map(on_host, found) == places


@pytest.mark.parametrize("axes", [(None, "d"), ("d",), (None, None, "d")])
def test_sharded_state_keeps_its_sharding_and_its_numbers(axes):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(*axes))
    tx, params = away(optax.scale_by_adam()), {"lora": {"a": stack()["lora"]["layers"]["a"]}}
    update = jax.jit(tx.update)
    alone, state = update(params, tx.init(params), params)
    shared = jax.device_put(params, sharding)
    before = tx.init(shared)
    assert before.mu["lora"]["a"].sharding == sharding.with_memory_kind("pinned_host")
    found, after = update(shared, before, shared)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, alone)
    assert on_host(after.mu["lora"]["a"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), after, state)


REFUSED = {
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()),
    "block norm": lambda: optax.clip_by_block_rms(1.0),
    "trust ratio": optax.scale_by_trust_ratio,
    "sign of failure": lambda: optax.apply_if_finite(optax.scale_by_adam(), 3),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_what_looks_beyond_one_element_is_refused(make):
    with pytest.raises(ConfigError, match=r"depends on others.*around it"):
        away(make()).init(stack())


@pytest.mark.parametrize(
    ("lengths", "nbytes", "page", "count"),
    [
        ([80], 800, 100, 8),
        ([80], 800, 10**6, 2),
        ([80, 640], 800, 10, 80),
        ([32, 48], 960, 100, 16),
        ([7], 70, 20, 7),
        ([1], 70, 20, 1),
        ([6, 1], 70, 20, 1),
    ],
)
def test_pages_are_equal_and_small_enough_where_the_axis_allows(lengths, nbytes, page, count):
    assert pages(lengths, nbytes, page) == count
    assert math.gcd(*lengths) % count == 0


def test_in_the_training_step_it_is_the_plain_optimizer_to_rounding():
    params = toy.init_params(jax.random.key(0))
    ends = []
    for tx in (
        optax.chain(away(optax.scale_by_adam()), optax.scale_by_learning_rate(RATE)),
        optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(RATE)),
    ):
        state = TrainState.create(toy.init_adapters(jax.random.key(1)), tx, jax.random.key(2))
        step = make_train_step(toy.apply, tx)
        for seed in range(6):
            state, _ = step(state, params, toy.make_batch(seed))
        ends.append(state.adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *ends)


def test_the_step_of_sharded_adapters_keeps_them_so_and_compiles_once(tmp_path):
    """On two devices, each with its share of the moments on the host; resumed as well."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, copies = (jax.NamedSharding(mesh, spec) for spec in (jax.P("d"), jax.P()))
    tx = optax.chain(
        optim.offload(optax.scale_by_adam(), page_bytes=64, smallest=16),
        optax.scale_by_learning_rate(RATE),
    )
    adapters, params = toy.init_adapters(jax.random.key(1)), toy.init_params(jax.random.key(0))

    def go_on(step, state, params, seeds):
        for seed in seeds:
            state, _ = step(state, params, toy.make_batch(seed))
        return state

    start = TrainState.create(adapters, tx, jax.random.key(2))
    alone = go_on(make_train_step(toy.apply, tx), start, params, range(4))
    adapters, params = jax.device_put(adapters, rows), jax.device_put(params, copies)
    start = TrainState.create(adapters, tx, jax.random.key(2))
    fresh, step = jax.tree.map(jnp.copy, start), make_train_step(toy.apply, tx)
    with compilations() as compiled:
        half = go_on(step, start, params, range(2))
        Checkpoints(tmp_path).save(half, {})
        whole = go_on(step, half, params, range(2, 4))
        restored, _ = Checkpoints(tmp_path).restore_latest(fresh)
        resumed = go_on(step, restored, params, range(2, 4))
    assert len(compiled) == 1
    assert_identical(resumed.adapters, whole.adapters)
    for moment in jax.tree.leaves((whole.opt_state[0].mu, resumed.opt_state[0].nu)):
        assert on_host(moment)
        assert moment.sharding.is_equivalent_to(rows.with_memory_kind("pinned_host"), moment.ndim)
    numbers = [jax.tree.map(np.asarray, end.adapters) for end in (alone, whole)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *numbers)
