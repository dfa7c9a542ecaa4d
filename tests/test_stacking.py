"""Several adapters on one base: in every row of a batch another, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqlora as jq
from jqlora.errors import ConfigError, UnsupportedSite
from jqlora.stacking import crop, pad, widest
from tests import toy_models

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPECS = [
    [jq.LoRA(rank=2, alpha=8, targets=["q_proj"]), jq.AdaLoRA(targets=["up_proj"])],
    jq.LoRA(rank=5, alpha=3, targets=["q_proj", "embed_tokens"]),
]
ROWS = [1, -1, 0, 1]  # which adapter serves each row; -1 is none


@pytest.fixture(scope="module")
def model():
    return toy_models.llama()


@pytest.fixture(scope="module")
def params():
    return toy_models.params_of(toy_models.Llama())["lm"]


@pytest.fixture(scope="module")
def plans(model, params):
    return [jq.plan(model, params, spec) for spec in SPECS]


@pytest.fixture(scope="module")
def adapters(plans):
    """All leaves at random, so that each adapter says something else."""

    def drawn(number, plan):
        noise = np.random.default_rng(number)
        fresh = jq.init(jax.random.key(number), plan)
        return jax.tree.map(lambda x: x + jnp.float32(noise.normal(0, 0.5, x.shape)), fresh)

    return [drawn(number, plan) for number, plan in enumerate(plans)]


@pytest.fixture(scope="module")
def prompts():
    """Left-padded, int32 [B, T]."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, toy_models.VOCABULARY, (len(ROWS), 6)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[::2, :2] = 0
    return ids, mask


@pytest.fixture(scope="module")
def solo(model, params, plans, adapters):
    """``apply`` and variables of each adapter alone; the last is the base's."""
    alone = [
        (jq.bind(model, plan), {"params": params, **own})
        for plan, own in zip(plans, adapters, strict=True)
    ]
    return [*alone, (jq.bind(model), {"params": params})]


@pytest.fixture(scope="module")
def together(model, params, plans, adapters):
    plan, stacked = jq.stack(plans, adapters)
    return jq.bind(model, plan), {"params": params, **stacked}


def test_greedy_tokens_of_every_row_are_those_of_its_adapter_alone(model, prompts, solo, together):
    options = {"model": model, "max_new_tokens": 8}
    found = jq.generate(*together, *prompts, **options, adapter_ids=ROWS)
    alone = [jq.generate(*one, *prompts, **options) for one in solo]
    expected = jnp.stack([alone[adapter][row] for row, adapter in enumerate(ROWS)])
    np.testing.assert_array_equal(found, expected)
    first = jnp.stack([tokens[0] for tokens in alone])
    assert len({tuple(tokens.tolist()) for tokens in first}) == len(alone)


def test_codes_are_decoded_once_for_all_rows(params, prompts, solo, together):
    stored = jax.eval_shape(lambda base: jq.quantize_params(base, jq.NF4()), params)

    def decoded(apply, variables):
        variables = {**variables, "params": stored}
        jaxpr = jax.make_jaxpr(lambda v: apply(v, prompts[0]).logits)(variables)
        return str(jaxpr).count("shift_right_logical")

    apply, variables = together
    routed = decoded(apply, {**variables, "adapter_ids": jnp.array(ROWS)})
    assert routed == decoded(*solo[-1]) > 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [([0, 1], "for each of the 4 rows"), ([2] * 4, "0 to 1"), ([0.5] * 4, "whole number")],
)
def test_numbers_that_name_no_adapter_are_refused(ids, message, model, prompts, together):
    with pytest.raises(ConfigError, match=message):
        jq.generate(*together, *prompts, model=model, max_new_tokens=1, adapter_ids=ids)


def test_one_adapter_is_no_stack(model, prompts, solo):
    with pytest.raises(ConfigError, match=r"jq\.stack"):
        jq.generate(*solo[0], *prompts, model=model, max_new_tokens=1, adapter_ids=[0] * 4)


def test_adapters_of_different_models_do_not_stack(model, params, plans, adapters):
    whole = jq.plan(model, params, jq.LoRA(rank=2, modules_to_save=["norm"]))
    with pytest.raises(UnsupportedSite, match=r"model\.norm.*trained whole by some"):
        jq.stack([plans[0], whole], [adapters[0], adapters[0]])
    placement = plans[0].placements[0]
    site = dataclasses.replace(placement.site, shape_out=(7,))
    other = jq.Plan((dataclasses.replace(placement, site=site),))
    with pytest.raises(UnsupportedSite, match=r"different models.*q_proj"):
        jq.stack([plans[0], other], [adapters[0], adapters[0]])


def test_padding_is_zero_and_comes_off_again(adapters):
    shapes = widest(adapters)
    for own in adapters:
        wide = pad(own, shapes)
        assert jax.tree.map(jnp.shape, crop(wide, own)) == jax.tree.map(jnp.shape, own)
        jax.tree.map(np.testing.assert_array_equal, crop(wide, own), own)
        total = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(wide))
        np.testing.assert_allclose(total, sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(own)))
