"""Planning, initialising and binding: the guards, and what reaches the model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import bind, init, plan
from jqlora.errors import AdapterNotReached, ConfigError, UnsupportedSite
from jqlora.methods import LoRA
from jqlora.quant import NF4, quantize, quantize_params
from tests import toy_models
from tests.toy_models import FORMS, IDS, VOCABULARY

pytestmark = pytest.mark.usefixtures("compile_quickly")


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(x)


class Outer(nn.Module):
    inner: type

    @nn.compact
    def __call__(self, x, *, skip=False):
        x = x if skip else self.inner(name="inner")(x)
        return nn.Dense(4, name="head")(x)


X = jnp.ones((2, 4))


def set_up(model, spec=None, *inputs, **keywords):
    params = model.init(jax.random.key(0), *inputs)["params"]
    ours = plan(model, params, spec or LoRA(rank=1), *inputs, **keywords)
    adapters = jax.tree.map(lambda leaf: leaf + 1.0, init(jax.random.key(1), ours, params))
    return ours, {"params": params, **adapters}


def test_a_stale_trace_inside_the_model_is_noticed():
    model = Outer(nn.jit(Inner))
    ours, variables = set_up(model, None, X)
    apply = bind(model, ours)
    apply(variables, X)
    with pytest.raises(AdapterNotReached, match=r"inner\.dense"):
        apply(variables, X)  # nn.jit reuses the trace, and with it the interception is skipped


def test_a_branch_that_skips_an_adapted_module_is_noticed():
    model = Outer(Inner)
    ours, variables = set_up(model, None, X)
    bind(model, ours)(variables, X)
    with pytest.raises(AdapterNotReached, match=r"never called inner\.dense,"):
        bind(model, ours)(variables, X, skip=True)


def test_a_detached_module_of_the_same_name_is_left_alone():
    class Detached(nn.Module):
        @nn.compact
        def __call__(self, x):
            other = Outer(Inner, parent=None)
            fresh = other.init(jax.random.key(5), x)
            return nn.Dense(4, name="head")(x), other.apply(fresh, x)

    model = Detached()
    ours, variables = set_up(model, None, X)
    adapted, other = bind(model, ours)(variables, X)
    base, alone = model.apply({"params": variables["params"]}, X)
    np.testing.assert_array_equal(other, alone)
    assert not np.array_equal(adapted, base)


def test_collections_must_be_those_of_the_plan():
    ours, variables = set_up(Outer(Inner), None, X)
    with pytest.raises(ValueError, match=r"lack the planned collections \['lora'\]"):
        bind(Outer(Inner), ours)({"params": variables["params"]}, X)
    with pytest.raises(ValueError, match=r"hold \['lora'\], which the bound plan knows nothing of"):
        bind(Outer(Inner))(variables, X)


def test_other_collections_and_keywords_pass_to_the_model():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(x)
            return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(x))

    model = Counting()
    everything = model.init(jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(1)}
    y, updated = bind(model)(everything, X, rngs=rngs, mutable=["batch_stats"])
    expected, _ = model.apply(everything, X, rngs=rngs, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, expected)
    assert "batch_stats" in updated


def test_a_parameter_under_the_reserved_prefix_is_refused():
    class Clash(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("jqlora_a", nn.initializers.ones, (4,))[None, :]

    variables = Clash().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="reserved prefix"):
        bind(Clash())(variables, X)


def test_example_inputs_come_from_the_model_or_must_be_given():
    model = toy_models.llama()
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS))["params"]
    assert plan(model, params, LoRA(rank=2)) == plan(model, params, LoRA(rank=2), IDS)
    with pytest.raises(TypeError, match="no example_inputs"):
        plan(FORMS["loop"], params, LoRA(rank=2))


def test_planning_allocates_nothing_and_counts_what_init_makes():
    model = toy_models.llama()
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS))["params"]
    stored = quantize_params(abstract, NF4(block=32, double_quant=True))
    spec = LoRA(rank=2, modules_to_save=["norm"])
    ours = plan(model, stored, spec)
    assert hash(ours) == hash(plan(model, abstract, spec))
    made = jax.eval_shape(lambda p: init(jax.random.key(0), ours, p), abstract)
    assert ours.trainable_count == sum(leaf.size for leaf in jax.tree.leaves(made))


def test_numbers_depend_on_the_key_and_the_layers_name_alone():
    scan, loop = toy_models.llama(), toy_models.llama(scan=False)
    many = init(jax.random.key(3), plan(scan, toy_models.params_of(scan), LoRA(rank=2)))
    few = plan(loop, toy_models.params_of(loop), LoRA(rank=2, targets=["layers.1.mlp.up_proj"]))
    alone = init(jax.random.key(3), few)["lora"]["model"]["layers_1"]["mlp"]["up_proj"]["a"]
    stacked = many["lora"]["model"]["layers"]["mlp"]["up_proj"]["a"]
    np.testing.assert_array_equal(alone, stacked[1])
    assert not np.array_equal(stacked[0], stacked[1])


@pytest.mark.parametrize("kind", ["kaiming", "gaussian"])
def test_first_weights_are_drawn_as_peft_draws_them(kind):
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(256)(x)

    x = jnp.ones((1, 400))
    ours, _ = set_up(Wide(), LoRA(rank=64, init=kind), x)
    leaves = init(jax.random.key(1), ours)["lora"]["Dense_0"]
    std = 1 / 64 if kind == "gaussian" else 1 / np.sqrt(3 * 400)
    assert np.std(leaves["a"]) == pytest.approx(std, rel=0.02)
    assert np.abs(leaves["a"]).max() > (3 if kind == "gaussian" else 1.7) * std
    assert not leaves["b"].any()
    if kind == "kaiming":
        assert np.abs(leaves["a"]).max() <= 1 / np.sqrt(400)


def test_an_embeddings_a_is_zero_and_its_b_is_normal():
    ours, _ = set_up(FORMS["loop"], LoRA(rank=16, targets=["embed"]), IDS)
    leaves = init(jax.random.key(1), ours)["lora"]["embed"]
    assert leaves["a"].shape == (VOCABULARY, 16)
    assert not leaves["a"].any()
    assert np.std(leaves["b"]) == pytest.approx(1, rel=0.1)


def test_parameters_trained_whole_override_their_originals_and_are_copies():
    model = toy_models.llama()
    params = toy_models.params_of(model)
    ours = plan(model, params, LoRA(rank=2, modules_to_save=["model.norm"]))
    with pytest.raises(ValueError, match="pass params to init"):
        init(jax.random.key(0), ours)
    adapters = init(jax.random.key(0), ours, params)
    norm = adapters["full"]["model"]["norm"]["scale"]
    np.testing.assert_array_equal(norm, params["model"]["norm"]["scale"])
    assert norm.unsafe_buffer_pointer() != params["model"]["norm"]["scale"].unsafe_buffer_pointer()
    adapters["full"]["model"]["norm"]["scale"] = jnp.zeros_like(norm)
    assert not bind(model, ours)({"params": params, **adapters}, IDS).logits.any()


def test_a_quantized_matrix_trained_whole_becomes_dense():
    model = FORMS["scan"]
    params = quantize_params(toy_models.params_of(model), NF4(block=32))
    ours = plan(model, params, LoRA(rank=2, targets=["up"], modules_to_save=["down"]), IDS)
    adapters = init(jax.random.key(0), ours, params)
    assert adapters["full"]["layers"]["down"]["kernel"].dtype == jnp.float32
    base = bind(model)({"params": params}, IDS)
    np.testing.assert_allclose(
        bind(model, ours)({"params": params, **adapters}, IDS), base, atol=1e-5
    )


def test_single_layers_of_a_stack_cannot_be_trained_whole():
    model = toy_models.llama()
    spec = LoRA(rank=2, targets=["q_proj"], modules_to_save=["layers.1.mlp.up_proj"])
    with pytest.raises(UnsupportedSite, match="single layers of the stack"):
        plan(model, toy_models.params_of(model), spec)


def test_of_two_specs_the_first_serves_a_module_that_both_match():
    model = toy_models.llama()
    params = toy_models.params_of(model)
    both = plan(model, params, [LoRA(rank=4, targets=["q_proj"]), LoRA(rank=2)])
    ranks = {row["module"].rsplit(".")[-1]: row["rank"] for row in both.table()}
    assert ranks["q_proj"] == "4"
    assert set(ranks.values()) == {"2", "4"}
    halves = [LoRA(rank=2, targets=["q_proj"], layers_to_transform=n) for n in (0, 1)]
    with pytest.raises(UnsupportedSite, match="different layers of the stack"):
        plan(model, params, halves)


def test_only_plain_dense_layers_can_be_quantized():
    class Custom(nn.Dense):
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Custom(32, name="custom")(x)

    x = jnp.ones((2, 32))
    params = Holder().init(jax.random.key(0), x)["params"]
    stored = {"custom": {**params["custom"], "kernel": quantize(params["custom"]["kernel"], NF4())}}
    with pytest.raises(UnsupportedSite, match="custom: a quantized kernel serves a plain"):
        bind(Holder())({"params": stored}, x)


def test_a_quantized_stack_is_not_copied_by_a_training_step():
    model = FORMS["scan and remat"]
    params = quantize_params(toy_models.params_of(model), NF4(block=32))
    ours = plan(model, params, LoRA(rank=2), IDS)
    adapters = init(jax.random.key(0), ours)

    def loss(adapters, params):
        return (bind(model, ours)({"params": params, **adapters}, IDS) ** 2).mean()

    text = str(jax.make_jaxpr(jax.grad(loss))(adapters, params))
    decoded = f"f32[{toy_models.DEPTH},32,64]"
    assert decoded not in text  # no whole stack of decoded weights exists at any time


def test_remat_keeps_the_outputs_of_projections_whatever_makes_them():
    # a quantized product is made of partial sums, an adapted one of two paths: none is kept
    model = toy_models.llama().clone(remat="dots")
    params = toy_models.params_of(model)

    def kept(params):
        ours = plan(model, params, LoRA(rank=2), IDS)
        apply = bind(model, ours)

        def run(adapters):
            return jax.vjp(lambda a: apply({"params": params, **a}, IDS).logits, adapters)[1]

        residuals = jax.tree.leaves(jax.eval_shape(run, init(jax.random.key(0), ours)))
        stack = (toy_models.DEPTH, *IDS.shape)
        return sorted(leaf.shape for leaf in residuals if leaf.shape[:3] == stack)

    assert kept(quantize_params(params, NF4(block=32))) == kept(params)
    assert len(kept(params)) == 7  # q, k, v, o, gate, up, and the layer's input


MISTAKES = {
    "rank": ({"rank": 0}, "rank=0"),
    "pattern": ({"rank_pattern": {"q": 1.5}}, r"rank_pattern\['q'\]=1.5"),
    "alpha": ({"alpha": 0}, "alpha=0"),
    "dropout": ({"dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
    "init": ({"init": "pissa"}, "init='pissa': known are kaiming, gaussian"),
    "expression": ({"targets": "(q"}, r"'\(q' is no regular expression"),
    "no targets": ({"targets": []}, "name a module"),
}


@pytest.mark.parametrize(("fields", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_value_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**fields)
