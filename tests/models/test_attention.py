"""Which implementation serves a call, soft-capped scores against their definition, and attention
by blocks against XLA's."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jqlora.errors import ConfigError
from jqlora.models.attention import attend, implementation
from jqlora.models.blockwise import blockwise_attention
from jqlora.models.masks import Attending
from tests.absent_gpu import absent_gpu

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_a_soft_cap_is_never_left_to_a_kernel_that_would_skip_it():
    half = jnp.dtype(jnp.bfloat16)
    assert implementation("auto", half, 64, 50.0) == "blockwise"
    assert implementation("xla", half, 64, 50.0) == "xla"
    assert implementation("cudnn", half, 64) == "cudnn"
    with absent_gpu():
        assert implementation("auto", half, 64, 50.0) == "xla"
        assert implementation("auto", half, 64) == "cudnn"
    with pytest.raises(ConfigError, match=r"cudnn.*50\.0.*auto, xla, blockwise"):
        implementation("cudnn", half, 64, 50.0)


@pytest.mark.parametrize("attention", ["cudnn", "blockwise"])
def test_a_bias_is_never_left_to_one_that_would_skip_it(attention):
    assert implementation("auto", jnp.dtype(jnp.float32), 64, biased=True) == "xla"
    with pytest.raises(ConfigError, match=f"{attention}.*bias.*auto, xla"):
        implementation(attention, jnp.dtype(jnp.float32), 64, biased=True)


def call(
    queries, keys, values, *, mask=None, window=None, causal=True, attention="auto", **options
):
    attending = Attending(
        tables=None,
        windowed_tables=None,
        mask=mask,
        windowed_mask=None,
        slot=None,
        causal=causal,
        window=window,
        emit_hidden=False,
    )
    return attend(
        queries, keys, values, attending, jnp.array(False), None, attention=attention, **options
    )[0]


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_capped_scores_follow_their_definition(window, masked, attention, draw):
    queries = 3 * draw((2, 6, 4, 8))
    keys, values = draw((2, 2, 6, 2, 8))
    segments = np.array([[1, 1, 1, 2, 2, 2], [1] * 6])
    same = segments[:, None, :, None] == segments[:, None, None, :]
    mask = jnp.asarray(same) if masked else None
    options = {"mask": mask, "window": window, "attention": attention}
    found = call(queries, keys, values, scale=0.5, softcap=2.0, **options)
    q, k, v = (np.asarray(x) for x in (queries, keys, values))
    expected = np.zeros((2, 6, 4, 8))
    for row, at, head in np.ndindex(2, 6, 4):
        first = 0 if window is None else max(at - window + 1, 0)
        seen = [i for i in range(first, at + 1) if not masked or same[row, 0, at, i]]
        scores = 0.5 * k[row, seen, head // 2] @ q[row, at, head]
        weights = np.exp(2 * np.tanh(scores / 2))
        expected[row, at, head] = weights / weights.sum() @ v[row, seen, head // 2]
    np.testing.assert_allclose(found, expected.reshape(2, 6, 32), rtol=1e-5, atol=1e-6)


def test_a_wide_cap_is_none(draw):
    queries = draw((2, 6, 4, 8))
    keys, values = draw((2, 2, 6, 2, 8))
    uncapped = call(queries, keys, values, scale=0.3)
    for attention in ("xla", "blockwise"):
        capped = call(queries, keys, values, scale=0.3, softcap=1e4, attention=attention)
        np.testing.assert_allclose(capped, uncapped, atol=1e-6)


SEGMENTS = np.repeat(np.array([[1, 2, 2, 0], [3, 3, 3, 4]], np.int32), 5, axis=1)  # [2, 20]
ROWS: dict[str, dict[str, Any]] = {
    "causal": {},
    "packed": {"mask": SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]},
    "window": {"window": 6},
    "packed window": {
        "mask": SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :],
        "window": 3,
    },
    "capped": {"softcap": 2.0},
    "both ways": {"causal": False},
    "padded both ways": {"causal": False, "mask": SEGMENTS[:, None, None, :] > 0},
}


def operands(draw, queries: int, keys: int, dtype: Any = jnp.float32) -> list[Any]:
    """Of four heads of queries on two of keys, and what is multiplied by the output's gradient."""
    shapes = ((2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8), (2, queries, 32))
    return [draw(shape, 1, dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("block", "causal", "window", "softcap"))
def with_gradients(
    mask, queries, keys, values, cotangents, *, block, causal=True, window=None, softcap=None
):
    """Output and gradients by blocks of at most ``block`` slots, or by XLA where that is None."""
    options = {"scale": 0.3, "causal": causal, "window": window, "softcap": softcap}

    def run(*parts):
        if block is None:
            return call(*parts, mask=mask, attention="xla", **options)
        return blockwise_attention(*parts, mask, block=block, **options).reshape(cotangents.shape)

    output, pull = jax.vjp(run, queries, keys, values)
    return output, *pull(cotangents)


def both(parts, block, *, mask=None, **options):
    """By blocks, and by XLA in fp32."""
    mask = None if mask is None else jnp.asarray(mask)
    whole = [part.astype(jnp.float32) for part in parts]
    return (
        with_gradients(mask, *parts, block=block, **options),
        with_gradients(mask, *whole, block=None, **options),
    )


@pytest.mark.parametrize("block", [8, 9, 64])
@pytest.mark.parametrize("name", ROWS)
def test_attention_by_blocks_equals_attention_at_once(name, block, draw):
    """Of 20 slots: in three blocks, of which the last is padded, and in one."""
    found, expected = both(operands(draw, 20, 20), block, **ROWS[name])
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_queries_and_keys_may_be_of_two_lengths(masked, draw):
    """As where a decoder attends to an encoder."""
    mask = np.arange(21)[None, None, None] < np.array([21, 4])[:, None, None, None]
    parts = operands(draw, 10, 21)
    found, expected = both(parts, 8, causal=False, mask=mask if masked else None)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_bf16_by_blocks_is_off_by_no_more_than_its_rounding(draw):
    found, exact = both(operands(draw, 20, 20, jnp.bfloat16), 8)
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        error = np.abs(np.asarray(mine, np.float32) - np.asarray(theirs))
        assert (error <= 2.0**-8 * np.abs(np.asarray(theirs)) + 1e-5).all()


def test_blocks_that_nobody_may_see_are_not_visited(draw):
    """What a window leaves behind is not multiplied by zero: NaN there would come through."""
    queries, keys, values, cotangents = operands(draw, 32, 32)
    spoiled = [x.at[:, :8].set(jnp.nan) for x in (keys, values)]
    cotangents = cotangents.at[:, :16].set(0)
    output, *gradients = with_gradients(None, queries, *spoiled, cotangents, block=8, window=6)
    assert np.isfinite(output[:, 16:]).all()
    assert all(np.isfinite(g[:, 16:]).all() for g in gradients)


def test_no_array_has_the_scores_of_a_whole_sequence(draw):
    length = 1024
    parts = operands(draw, length, length)
    by_blocks, at_once = (
        max(sizes_in(with_gradients.trace(None, *parts, block=block).jaxpr.jaxpr))
        for block in (128, None)
    )
    scores = 2 * 4 * length * length
    assert at_once >= scores
    assert by_blocks <= scores // 8


def sizes_in(jaxpr):
    """The sizes of all results in a program, in those of its parts too."""
    for equation in jaxpr.eqns:
        yield from (getattr(v.aval, "size", 0) for v in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


def test_a_batch_of_calls_equals_the_calls_one_by_one(draw):
    def run(*parts):
        return blockwise_attention(*parts, None, block=8, scale=0.3, causal=True)

    calls = [operands(draw, 20, 20)[:3] for _ in range(2)]
    parts = [jnp.stack(x) for x in zip(*calls, strict=True)]
    single = [jax.jit(run)(*(x[i] for x in parts)) for i in range(2)]
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(*parts), jnp.stack(single), rtol=1e-6)


@pytest.mark.parametrize("spec", [P("d"), P(None, None, "d")], ids=["rows", "heads"])
def test_blocks_of_what_lies_on_two_devices_stay_there(spec, draw):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = jax.device_put(operands(draw, 20, 20)[:3], NamedSharding(mesh, spec))

    def run(*parts):
        return blockwise_attention(*parts, None, block=8, scale=0.3, causal=True).sum()

    gradients = jax.jit(jax.grad(run, (0, 1, 2))).lower(*parts).compile()
    assert not re.findall(r"all-\w+|collective-\w+", gradients.as_text())
