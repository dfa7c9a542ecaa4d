"""AdaLoRA as a method: its penalties, its scale, embeddings, and what compacting leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import bind, init, plan
from jqlora.compacting import as_lora, compact
from jqlora.errors import ConfigError, NoSiteMatched, UnsupportedSite
from jqlora.merging import merge
from jqlora.methods import AdaLoRA, LoRA
from jqlora.models.layers import scan_to_loop
from jqlora.tree import flatten, unflatten
from tests import toy_models
from tests.toy_models import FORMS, IDS

pytestmark = pytest.mark.usefixtures("compile_quickly")

EVERYTHING = AdaLoRA(init_rank=4, target_rank=2, alpha=8, targets=r".*")


def logits_of(model, plan, params, adapters):
    return jax.jit(bind(model, plan))({"params": params, **adapters}, IDS)


def set_up(model, spec):
    """A plan, the parameters, and random adapters of which about half the λ are zero."""
    params = toy_models.params_of(model)
    ours = plan(model, params, spec, IDS)
    generator = np.random.default_rng(0)
    flat = flatten(init(jax.random.key(0), ours))
    for path, leaf in flat.items():
        noise = generator.normal(0, 0.5, leaf.shape) * (np.asarray(leaf) != 0)
        if path[-1] == "lam":
            there = np.asarray(flat[(*path[:-1], "p")]).any(-2, keepdims=True)
            noise = generator.normal(1, 0.5, leaf.shape) * (generator.random(leaf.shape) > 0.5)
            noise = noise * there
        flat[path] = jnp.asarray(noise, jnp.float32)
    return ours, params, unflatten(flat)


def matrices(plan, adapters):
    """Every P [K, R] and Q [R, N] of the adapted layers."""
    for placement in plan.placements:
        site, node = placement.site, adapters["adalora"]
        for name in site.path:
            node = node[name]
        p = np.asarray(node["p"], np.float64).reshape(-1, *node["p"].shape[-2:])
        q = np.asarray(node["q"], np.float64).reshape(-1, *node["q"].shape[-2:])
        for layer, served in enumerate(placement.layers):
            if served:
                yield p[layer], q[layer]


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("kind", ["peft", "paper"])
def test_the_penalty_is_the_definition_over_the_adapted_layers(kind, layers):
    spec = AdaLoRA(
        init_rank=4,
        target_rank=2,
        orthogonality=kind,
        orthogonality_weight=0.3,
        layers_to_transform=layers,
    )
    model = FORMS["scan"]
    ours, _, adapters = set_up(model, spec)
    distances = [
        np.linalg.norm(gram - np.eye(4))
        for p, q in matrices(ours, adapters)
        for gram in (p.T @ p, q @ q.T)
    ]
    expected = np.mean(distances) if kind == "peft" else np.square(distances).sum()
    value, gradient = jax.jit(jax.value_and_grad(bind(model, ours).penalty))(adapters)
    np.testing.assert_allclose(value, 0.3 * expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert float(bind(model).penalty({})) == 0.0


def test_every_spec_has_its_own_penalty():
    first = AdaLoRA(targets=["up"], orthogonality="paper")
    both = set_up(FORMS["scan"], [first, AdaLoRA(targets=["down"])])
    alone = [set_up(FORMS["scan"], spec) for spec in (first, AdaLoRA(targets=["down"]))]
    adapters = both[2]
    parts = [
        jax.jit(bind(FORMS["scan"], part).penalty)(
            {"adalora": {"layers": {n: adapters["adalora"]["layers"][n]}}}
        )
        for (part, _, _), n in zip(alone, ("up", "down"), strict=True)
    ]
    np.testing.assert_allclose(
        jax.jit(bind(FORMS["scan"], both[0]).penalty)(adapters), sum(parts), rtol=1e-6
    )


def test_the_scale_is_that_of_the_initial_rank_for_ever():
    model = FORMS["scan"]
    ours, params, adapters = set_up(model, AdaLoRA(init_rank=4, target_rank=2, alpha=8))
    doubled = set_up(model, AdaLoRA(init_rank=4, target_rank=2, alpha=16))[0]
    kernel = params["layers"]["up"]["kernel"]
    one = merge(ours, params, adapters)["layers"]["up"]["kernel"] - kernel
    two = merge(doubled, params, adapters)["layers"]["up"]["kernel"] - kernel
    np.testing.assert_allclose(two, 2 * one, atol=1e-5)
    smaller, left = compact(ours, adapters)
    three = merge(smaller, params, left)["layers"]["up"]["kernel"] - kernel
    np.testing.assert_allclose(three, one, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "layers"), [("scan", None), ("scan", (1,)), ("loop", (0,)), ("experts", None)]
)
def test_compacting_removes_pruned_triplets_and_changes_no_output(form, layers):
    spec = (
        EVERYTHING
        if layers is None
        else AdaLoRA(init_rank=4, target_rank=2, layers_to_transform=layers)
    )
    model = FORMS[form]
    ours, params, adapters = set_up(model, spec)
    expected = logits_of(model, ours, params, adapters)
    smaller, left = compact(ours, adapters)
    assert jax.tree.map(jnp.shape, init(jax.random.key(0), smaller)) == jax.tree.map(
        jnp.shape, left
    )
    count = sum(np.count_nonzero(v) for p, v in flatten(adapters).items() if p[-1] == "lam")
    assert count == sum(np.count_nonzero(v) for p, v in flatten(left).items() if p[-1] == "lam")
    assert 0.2 < smaller.trainable_count / ours.trainable_count < 0.8
    # what is left of one layer is left, however often it is compacted
    assert compact(smaller, left)[0] == smaller
    plain, leaves = as_lora(ours, adapters)
    assert all(isinstance(placement.spec, LoRA) for placement in plain.placements)
    for form_plan, form_leaves in ((smaller, left), (plain, leaves)):
        logits = logits_of(model, form_plan, params, form_leaves)
        np.testing.assert_allclose(logits, expected, atol=2e-4 * float(np.abs(expected).max()))


def test_a_compacted_stack_is_its_compacted_layers():
    ours, params, adapters = set_up(FORMS["scan"], EVERYTHING)
    loop_plan = plan(FORMS["loop"], scan_to_loop(params), EVERYTHING, IDS)
    stacked, _ = compact(ours, adapters)
    loop, _ = compact(loop_plan, scan_to_loop(adapters))
    patterns = [dict(p.placements[0].spec.rank_pattern) for p in (stacked, loop)]
    assert patterns[0] == patterns[1]
    assert stacked.trainable_count == loop.trainable_count


def test_a_module_may_be_left_with_nothing():
    model = FORMS["scan"]
    ours, params, adapters = set_up(
        model, AdaLoRA(init_rank=4, target_rank=2, targets=["up", "down"])
    )
    up = adapters["adalora"]["layers"]["up"]
    up["lam"] = jnp.zeros_like(up["lam"])
    expected = logits_of(model, ours, params, adapters)
    for form, leaves in (compact(ours, adapters), as_lora(ours, adapters)):
        logits = logits_of(model, form, params, leaves)
        np.testing.assert_allclose(logits, expected, atol=1e-4 * float(np.abs(expected).max()))
    assert [p.site.path[-1] for p in as_lora(ours, adapters)[0].placements] == ["down"]
    with pytest.raises(UnsupportedSite, match="no triplet is left"):
        as_lora(ours, init(jax.random.key(0), ours))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_rank": 4, "target_rank": 5}, "target_rank=5 must not exceed init_rank=4"),
        ({"init_rank": 0}, "init_rank=0: a rank is a whole number"),
        ({"alpha": 0}, "alpha=0: must be positive"),
        ({"orthogonality": "svd"}, "orthogonality='svd': known are peft, paper"),
        ({"orthogonality_weight": -1.0}, "orthogonality_weight=-1.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": []}, r"targets=\[\]"),
        ({"targets": "("}, "no regular expression"),
        ({"rank_pattern": {"up": [True]}}, r"\['up'\] has 1 entries, expected init_rank=12"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AdaLoRA(**fields)


def test_ranks_and_patterns_that_fit_no_module_are_refused():
    params = toy_models.params_of(FORMS["scan"])
    with pytest.raises(UnsupportedSite, match=r"rank 33 at layers\.0\.up"):
        plan(FORMS["scan"], params, AdaLoRA(init_rank=33), IDS)
    pattern = {"layers.0.upp": [True] * 12}
    with pytest.raises(
        NoSiteMatched, match=r"'layers\.0\.upp' is no adapted module; .*layers\.0\.up"
    ):
        plan(FORMS["scan"], params, AdaLoRA(rank_pattern=pattern), IDS)
