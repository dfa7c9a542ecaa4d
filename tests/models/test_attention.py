"""Which implementation serves a call, and soft-capped scores against their definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.errors import ConfigError
from jqlora.models.attention import attend, implementation
from jqlora.models.masks import Attending

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_a_soft_cap_is_never_left_to_a_kernel_that_would_skip_it():
    assert implementation("auto", jnp.dtype(jnp.bfloat16), 64, 50.0) == "xla"
    assert implementation("cudnn", jnp.dtype(jnp.bfloat16), 64) == "cudnn"
    with pytest.raises(ConfigError, match=r"cudnn.*50\.0.*auto, xla"):
        implementation("cudnn", jnp.dtype(jnp.bfloat16), 64, 50.0)


def call(queries, keys, values, *, mask=None, window=None, **options):
    attending = Attending(
        tables=None,
        windowed_tables=None,
        mask=mask,
        windowed_mask=None,
        slot=None,
        causal=True,
        window=window,
        emit_hidden=False,
    )
    return attend(
        queries, keys, values, attending, jnp.array(False), None, attention="auto", **options
    )[0]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_capped_scores_follow_their_definition(window, masked, draw):
    queries = 3 * draw((2, 6, 4, 8))
    keys, values = draw((2, 2, 6, 2, 8))
    segments = np.array([[1, 1, 1, 2, 2, 2], [1] * 6])
    same = segments[:, None, :, None] == segments[:, None, None, :]
    mask = jnp.asarray(same) if masked else None
    found = call(queries, keys, values, mask=mask, window=window, scale=0.5, softcap=2.0)
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
    capped = call(queries, keys, values, scale=0.3, softcap=1e4)
    np.testing.assert_allclose(capped, call(queries, keys, values, scale=0.3), atol=1e-6)
