"""Rotary tables against transformers' own, for every scaling and many settings."""

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.models import LlamaConfig
from jqlora.models.rope import SCALINGS, Rope, rope_tables, rotate
from tests.models.variants import LLAMA3, TINY, YARN

pytestmark = pytest.mark.usefixtures("compile_quickly")

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.02, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 1.1, 1.5, 2.5, 4.0, 8.0, 16.0, 30.0],
    "original_max_position_embeddings": 50,
}
SETTINGS = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": LLAMA3,
    "llama3_of_8b": LLAMA3 | {"original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn_by_lengths": {k: v for k, v in YARN.items() if k != "factor"} | {"factor": None},
    "yarn_attention_factor": YARN | {"attention_factor": 0.7},
    "yarn_magnitudes": YARN | {"mscale": 0.9, "mscale_all_dim": 0.6},
    "longrope": LONGROPE,
    "longrope_by_factor": LONGROPE | {"factor": 3.0},
    "longrope_attention_factor": LONGROPE | {"attention_factor": 0.7},
    "yarn_narrow": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
}


def config(name: str, **changes) -> LlamaConfig:
    return LlamaConfig.from_hf(
        TINY | {"model_type": "llama", "head_dim": 16, "rope_parameters": SETTINGS[name]} | changes
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("longest", [40, 300])
def test_tables_equal_those_of_transformers(name, longest):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = config(name)
    written = {k: v for k, v in ours.to_hf().items() if k != "rope_parameters"}
    theirs = transformers.LlamaConfig(**written, rope_parameters=dict(SETTINGS[name]))
    positions = np.arange(longest, dtype=np.int32)[None]
    with torch.no_grad():
        expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(positions))
    tables = rope_tables(
        ours.rope, jnp.asarray(positions), head_dim=16, max_positions=ours.max_position_embeddings
    )
    for mine, table in zip(tables, expected, strict=True):
        # a frequency is known to one float32 rounding, which the position multiplies
        budget = 4 * np.finfo(np.float32).eps * longest
        np.testing.assert_allclose(mine, table.numpy(), atol=budget)


def test_every_scaling_is_compared():
    assert {setting["rope_type"] for setting in SETTINGS.values()} == set(SCALINGS)


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_rotated_products_depend_on_distance_alone(name, getkey):
    import jax

    queries, keys = jax.random.normal(getkey(), (2, 1, 1, 1, 16))
    rope = config(name).rope

    def product(i: int, j: int) -> float:
        turned = []
        for x, at in ((queries, i), (keys, j)):
            positions = jnp.full((1, 1), at, jnp.int32)
            turned.append(rotate(x, *rope_tables(rope, positions, head_dim=16, max_positions=64)))
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(7, 3) == pytest.approx(product(27, 23), rel=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-2)


def test_the_rest_of_a_partly_rotated_head_passes_unchanged(getkey):
    import jax

    x = jax.random.normal(getkey(), (1, 4, 2, 16))
    rope = Rope(partial=0.75)
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    cos, sin = rope_tables(rope, positions, head_dim=16, max_positions=64)
    whole = rope_tables(Rope(), positions, head_dim=12, max_positions=64)
    turned = rotate(x, cos, sin)
    np.testing.assert_array_equal(turned[..., 12:], x[..., 12:])
    np.testing.assert_array_equal(turned[..., :12], rotate(x[..., :12], *whole))


def test_dynamic_models_serve_sequences_beyond_their_training():
    assert config("dynamic").longest == 2 * TINY["max_position_embeddings"]
    assert config("yarn").longest == TINY["max_position_embeddings"]
