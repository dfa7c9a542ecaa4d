"""8-bit moments: what is stored, how closely, and that bitsandbytes' optimizers do the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora import optim
from jqlora.optim.eight_bit import EightBit
from jqlora.quant.codebooks import dynamic_map

SHAPE = (24, 512)


@pytest.fixture(autouse=True)
def loose_promotion():
    """optax mixes integer counts and floats; ``make_train_step`` allows it the same."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_an_element_takes_one_byte_and_a_block_one_float(draw):
    params = {"a": draw(SHAPE)}
    plain, stored = optim.adamw(1e-3), optim.adamw(1e-3, bits=8)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tx.init(params))) for tx in (plain, stored)]
    count = params["a"].size
    assert sizes[0] - sizes[1] == 2 * (4 * count - count - 4 * count // 256)


def test_small_leaves_stay_whole():
    state = optim.eight_bit(optax.scale_by_adam()).init(
        {"a": jnp.zeros(4095), "b": jnp.zeros(4096)}
    )
    assert isinstance(state.mu["b"], EightBit)
    assert isinstance(state.mu["a"], jax.Array)


def test_each_moment_takes_its_own_map():
    state = optim.eight_bit(optax.scale_by_adam()).init({"a": jnp.zeros(4096)})
    assert state.mu["a"].signed
    assert not state.nu["a"].signed


@pytest.mark.parametrize("size", [4096, 4097, 5000])
@pytest.mark.parametrize("signed", [True, False])
def test_decoding_is_within_half_a_gap_of_what_was_encoded(size, signed, draw):
    moment = draw((size,))
    moment = moment if signed else moment**2
    encode, decoded = jax.jit(EightBit.encode, static_argnames="signed"), jax.jit(EightBit.decode)
    stored = encode(moment, signed=signed)
    kept = decoded(stored)
    scale = np.repeat(np.asarray(stored.scales).reshape(-1), 256)[:size]
    gap = np.diff(dynamic_map(signed=signed)).max()
    assert (np.abs(np.asarray(kept) - np.asarray(moment)) <= scale * (gap / 2 + 1e-6)).all()
    # what has been decoded is encoded without further loss
    np.testing.assert_array_equal(encode(kept, signed=signed).codes, stored.codes)


def test_zeros_stay_zeros_and_nothing_is_nan():
    stored = EightBit.encode(jnp.zeros(4096), signed=True)
    assert not stored.decode().any()


def test_the_first_update_is_made_before_anything_is_rounded(draw):
    params = {"a": draw(SHAPE)}
    gradient = {"a": draw(SHAPE)}
    found = [
        tx.update(gradient, tx.init(params), params)[0]["a"]
        for tx in (optim.adamw(1e-3, bits=8), optim.adamw(1e-3))
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=signed).numpy()
    np.testing.assert_array_equal(dynamic_map(signed=signed), theirs)


ADAM, LION = {"lr": 1e-2, "betas": (0.9, 0.95)}, {"lr": 1e-3, "betas": (0.9, 0.95)}


def adamw(decay, bits):
    return optim.adamw(
        ADAM["lr"], betas=ADAM["betas"], weight_decay=decay, max_grad_norm=None, bits=bits
    )


def lion(decay, bits):
    return optim.lion(LION["lr"], betas=LION["betas"], weight_decay=decay, bits=bits)


CASES = {"AdamW8bit": (adamw, ADAM), "Lion8bit": (lion, LION)}
FIELDS = {"mu": "1", "nu": "2"}
# bitsandbytes looks codes up by the scaled value rounded to 16 bits, on its CPU backend
GRID = 2 / 65536


@pytest.mark.parity
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", CASES)
def test_updates_and_codes_are_those_of_bitsandbytes_within_its_rounding(name, decay):
    """Each update starts from the state that bitsandbytes left, so that nothing adds up."""
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes")
    make, settings = CASES[name]
    rng = np.random.default_rng(0)
    start = rng.normal(size=SHAPE).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = getattr(bnb.optim, name)([parameter], weight_decay=decay, **settings)
    stored, whole = make(decay, 8), make(decay, 32)
    update, exactly = jax.jit(stored.update), jax.jit(whole.update)

    def theirs(direction):
        """The state of one optax direction with bitsandbytes' codes in it."""
        found = optimizer.state[parameter]
        fields = {}
        for field, number in FIELDS.items():
            if hasattr(direction, field):
                codes = jnp.asarray(found[f"state{number}"].numpy())
                scales = jnp.asarray(found[f"absmax{number}"].numpy())
                old = getattr(direction, field)["a"]
                fields[field] = {"a": old.replace(codes=codes, scales=scales)}
        return direction._replace(**fields)

    ours, state = {"a": jnp.asarray(start)}, stored.init({"a": jnp.asarray(start)})
    for _ in range(10):
        gradient = {"a": jnp.asarray(rng.normal(size=SHAPE).astype(np.float32))}
        parameter.grad = torch.tensor(np.asarray(gradient["a"]))
        optimizer.step()
        _, exact = exactly(gradient, jax.tree.map(decode, state, is_leaf=is_stored), ours)
        updates, state = update(gradient, state, ours)
        after = np.asarray(optax.apply_updates(ours, updates)["a"])
        np.testing.assert_allclose(after, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)

        found = theirs(state[1])
        for field in FIELDS.keys() & set(found._fields):
            mine, other = getattr(state[1], field)["a"], getattr(found, field)["a"]
            np.testing.assert_allclose(mine.scales, other.scales, rtol=1e-6)
            moment = getattr(exact[1], field)["a"]
            scale = jnp.repeat(mine.scales, 256).reshape(SHAPE)
            error = [jnp.abs(kept.decode() - moment) / scale for kept in (mine, other)]
            # theirs is the nearest code as well, or one that is nearest but for the grid
            assert (error[1] - error[0]).max() <= GRID
            assert (mine.codes != other.codes).mean() < 0.05
        ours = {"a": jnp.asarray(parameter.detach().numpy())}
        state = (state[0], found, *state[2:])


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_a_run_stays_nearer_to_bitsandbytes_than_to_the_optimizer_in_fp32(name):
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes")
    make, settings = CASES[name]
    rng = np.random.default_rng(1)
    start = rng.normal(size=SHAPE).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = getattr(bnb.optim, name)([parameter], weight_decay=0.0, **settings)
    runs = []
    for bits in (8, 32):
        tx, params = make(0.0, bits), {"a": jnp.asarray(start)}
        runs.append([jax.jit(tx.update), tx.init(params), params])
    for _ in range(20):
        gradient = rng.normal(size=SHAPE).astype(np.float32)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        for run in runs:
            updates, run[1] = run[0]({"a": jnp.asarray(gradient)}, run[1], run[2])
            run[2] = optax.apply_updates(run[2], updates)
    theirs = parameter.detach().numpy()
    distance = [float(np.abs(run[2]["a"] - theirs).mean()) for run in runs]
    assert distance[0] < 0.5 * distance[1]


def is_stored(node):
    return isinstance(node, EightBit)


def decode(node):
    return node.decode() if is_stored(node) else node
