"""Sites: what one abstract trace finds, and what the modules are called."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jqlora.attach import inspect_model, plan
from jqlora.errors import NoSiteMatched, UnsupportedSite
from jqlora.methods import LoRA
from jqlora.quant import NF4, quantize_params
from tests import toy_models
from tests.toy_models import FORMS, IDS


def sites_of(model, *inputs):
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))["params"]
    return {site.template: site for site in inspect_model(model, params, *inputs).sites}


@pytest.mark.parametrize("tied", [True, False])
def test_llama_modules_have_their_hugging_face_names(tied):
    model = toy_models.llama(tied=tied)
    survey = inspect_model(model, toy_models.params_of(model), IDS)
    names = {name for leaf in survey.leaves for name in leaf.names}
    blocks = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    blocks += ["input_layernorm", "post_attention_layernorm"]
    expected = {f"model.layers.{i}.{block}" for i in range(2) for block in blocks}
    assert names == expected | {"model.embed_tokens", "model.norm"} | (
        set() if tied else {"lm_head"}
    )
    embedding = survey.sites[0]
    assert embedding.template == "model.embed_tokens"
    assert embedding.attended == tied


def test_scanned_and_looped_models_have_the_same_names():
    scan, loop = (
        {name for site in sites_of(FORMS[form], IDS).values() for name in site.names}
        for form in ("scan", "loop")
    )
    assert (
        scan
        == loop
        == {"embed", "head", *(f"layers.{i}.{n}" for i in (0, 1) for n in ("up", "down"))}
    )


def test_each_lead_axis_is_numbered_where_it_was_added():
    site = sites_of(FORMS["experts"], IDS)["layers.{}.experts.{}"]
    assert site.lead == (2, 3)
    assert site.names[:4] == tuple(
        f"layers.{i}.experts.{j}" for i, j in [(0, 0), (0, 1), (0, 2), (1, 0)]
    )
    assert (site.features_in, site.features_out) == (32, 32)


def test_general_dense_layers_are_matrices_of_flattened_axes():
    sites = sites_of(FORMS["attention"], IDS)
    query, out = (sites[f"layers.{{}}.attention.{name}"] for name in ("query", "out"))
    assert (query.shape_in, query.shape_out) == ((32,), (2, 16))
    assert (out.shape_in, out.shape_out) == ((2, 16), (32,))


def test_a_quantized_model_has_the_sites_of_the_dense_one():
    model = FORMS["scan"]
    params = toy_models.params_of(model)
    stored = quantize_params(jax.eval_shape(lambda: params), NF4(block=32), skip=())
    assert inspect_model(model, stored, IDS) == inspect_model(model, params, IDS)


def test_names_made_from_classes_keep_their_numbers():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="fc_1")(nn.Dense(4)(x))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner()(Inner(name="encoderblock_7")(x))

    assert list(sites_of(Outer(), jnp.ones((2, 4)))) == [
        "encoderblock.7.Dense_0",
        "encoderblock.7.fc_1",
        "Inner_0.Dense_0",
        "Inner_0.fc_1",
    ]


class Odd(nn.Module):
    """Modules that no adapter can serve, beside one that it can."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="plain")(x)
        x = nn.Einsum((4, 4), "...a,ab->...b", name="einsum")(x)
        x = nn.Conv(4, (3,), name="conv")(x)
        x = nn.DenseGeneral(4, axis=0, name="first_axis")(x)
        return nn.DenseGeneral(4, batch_dims=(0,), name="batched")(x)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("einsum", "nn.Einsum is not supported"),
        ("conv", "Conv is no linear layer"),
        ("first_axis", "not its input's last ones"),
        ("batched", "batch_dims"),
    ],
)
def test_a_module_that_cannot_be_served_is_refused_with_its_reason(name, reason):
    x = jnp.ones((2, 3, 4))
    params = jax.eval_shape(lambda: Odd().init(jax.random.key(0), x))["params"]
    with pytest.raises(UnsupportedSite, match=f"^{name}: .*{reason}"):
        plan(Odd(), params, LoRA(rank=1, targets=[name]), x)
    chosen = plan(Odd(), params, LoRA(rank=1, exclude=["einsum", "first_axis", "batched"]), x)
    assert [site.template for site in chosen.sites] == ["plain"]


MISTAKES = {
    "a misspelt name": (
        {"targets": ["qproj", "v_proj"]},
        r"target 'qproj' matched no module; nearest: .*self_attn\.q_proj",
    ),
    "a pattern": ({"targets": r".*attention.*"}, r"target '\.\*attention\.\*' matched no module"),
    "an exclusion of nothing": (
        {"exclude": ["w_proj"]},
        "exclude 'w_proj' matched no module; nearest: ",
    ),
    "an exclusion of everything": (
        {"targets": ["q_proj"], "exclude": ["q_proj"]},
        "matched 2 modules, and exclude=.* took all away",
    ),
    "everything trained whole": (
        {"targets": ["q_proj"], "modules_to_save": ["q_proj"]},
        "took all away",
    ),
    "a rank for nothing": (
        {"targets": ["q_proj"], "rank_pattern": {"v_proj": 2}},
        r"rank_pattern key 'v_proj' matched no adapted module; nearest: .*q_proj",
    ),
    "an alpha for nothing": ({"alpha_pattern": {"w": 2}}, "alpha_pattern key 'w' matched no"),
    "a layer too many": (
        {"layers_to_transform": [0, 2]},
        r"layers_to_transform has \[2\], but the targeted modules' layers are 0..1",
    ),
    "a module to save that is none": (
        {"modules_to_save": ["nrom"]},
        "modules_to_save 'nrom' ends no module's name; nearest: norm",
    ),
}


@pytest.mark.parametrize(("fields", "message"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("scan", [True, False])
def test_whatever_matches_nothing_is_an_error_of_its_own(fields, message, scan):
    model = toy_models.llama(scan=scan)
    with pytest.raises(NoSiteMatched, match=message):
        plan(model, toy_models.params_of(model), LoRA(rank=2, **fields))


def test_a_rank_that_its_matrix_cannot_hold_is_refused():
    model = toy_models.llama()
    with pytest.raises(UnsupportedSite, match=r"rank 17 at .*k_proj: its matrix is 32 x 16.* 16 "):
        plan(model, toy_models.params_of(model), LoRA(rank=17))
