"""Reading config.json as transformers does, and refusing what cannot be honoured."""

import pytest

from jqlora.errors import CheckpointError
from jqlora.models import (
    FAMILIES,
    LlamaForCausalLM,
    family_for,
    family_of,
    task_of,
)
from jqlora.models.kinds import KINDS
from tests.models.variants import LLAMA3, ROWS, TINY, YARN

pytestmark = pytest.mark.usefixtures("compile_quickly")

every_variant = pytest.mark.parametrize("name", ROWS)


def parse(hf):
    return family_of(hf).parse(hf)


def parsed(name="llama2_mha", **changes):
    return parse(TINY | ROWS[name] | changes)


@every_variant
@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "eos_token_id": [2, 7]}])
def test_configs_survive_writing_and_reading_in_both_spellings(name, spelling, changes):
    config = parsed(name, **changes)
    written = config.to_hf(spelling)
    assert parse(written) == config
    old_keys = {"rope_theta", "rope_scaling", "torch_dtype"} & set(written)
    new_keys = {"rope_parameters", "dtype"} & set(written)
    assert not (new_keys if spelling == "old" else old_keys)


@pytest.mark.parity
@every_variant
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_transformers_reads_the_same_from_what_is_written(name, spelling):
    transformers = pytest.importorskip("transformers")
    config = parsed(name, dtype="float16")
    theirs = transformers.AutoConfig.for_model(**config.to_hf(spelling))
    assert parse(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        ),
        (
            {
                "rope_theta": 500000.0,
                "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            },
            LLAMA3,
        ),
        (
            {"rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
            YARN,
        ),
        ({"rope_scaling": None}, None),
    ],
)
@pytest.mark.parametrize("old_type_key", ["type", "rope_type"])
def test_old_and_new_rope_spellings_mean_the_same(old, new, old_type_key):
    scaling = old.get("rope_scaling")
    if scaling:
        kind = scaling.get("type", scaling.get("rope_type"))
        rest = {k: v for k, v in scaling.items() if k not in ("type", "rope_type")}
        old = old | {"rope_scaling": {old_type_key: kind, **rest}}
    assert parsed(**old) == parsed(rope_parameters=new)


def test_both_spellings_of_the_dtype_are_read():
    assert parsed(torch_dtype="bfloat16") == parsed(dtype="bfloat16")
    assert parsed(torch_dtype="torch.float16").dtype == "float16"
    assert parsed().dtype is None


@pytest.mark.parity
@pytest.mark.parametrize("model_type", [*KINDS, "gpt2"])
def test_absent_keys_take_the_defaults_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept = {key: TINY[key] for key in sizes} | {"model_type": model_type}
    kept |= {"num_attention_heads": 32, "hidden_size": 64, "eos_token_id": 2, "bos_token_id": 1}
    kept |= {"pad_token_id": 0}
    kept |= {"use_sliding_window": True} if model_type in ("qwen2", "qwen3") else {}
    theirs = transformers.AutoConfig.for_model(**kept).to_dict()
    assert parse(kept) == parse(theirs)


def test_gemma_2_caps_unless_its_config_says_null():
    capped, null = parsed("gemma2"), {"attn_logit_softcapping": None}
    assert (capped.attention_softcap, capped.logit_softcap) == (3.0, 2.0)
    assert parse({"model_type": "gemma2", **TINY}).attention_softcap == 50.0
    assert parsed("gemma2", **null).attention_softcap is None
    full = parsed("gemma2", layer_types=["full_attention"] * 3)
    assert full.windowed == (False,) * 3
    assert full.sliding_window == 4  # transformers asks for one all the same


REFUSED = [
    ({"hidden_act": "quick_gelu"}, r"hidden_act='quick_gelu'.*silu"),
    ({"rope_scaling": {"type": "su", "factor": 2}}, r"rope_type.*'su'.*llama3"),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, r"longrope.*lacks 'short_factor'"),
    (
        {
            "model_type": "phi3",
            "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]},
        },
        r"short_factor.*\[1\].*4 numbers",
    ),
    ({"model_type": "phi3", "partial_rotary_factor": 1.5}, r"partial_rotary_factor=1.5.*at most 1"),
    (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
        },
        r"sliding_attention.*'linear'.*default",
    ),
    (
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        r"attn_logit_softcapping=50.0.*None",
    ),
    (
        {"model_type": "gemma2", "use_bidirectional_attention": True},
        r"use_bidirectional_attention=True.*False",
    ),
    ({"model_type": "gemma2", "final_logit_softcapping": 0}, r"final_logit_softcapping=0.*above 0"),
    ({"rope_scaling": {"rope_type": "linear"}}, r"linear.*lacks 'factor'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2, "twist": 1}}, r"'twist'.*factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of rotary"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5.*1.0"),
    ({"attention_dropout": 0.1}, r"attention_dropout=0.1.*0.0"),
    ({"hidden_size": None}, r"hidden_size is missing"),
    ({"vocab_size": "67"}, r"vocab_size='67'.*positive integer"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads=3 does not divide"),
    ({"hidden_size": 34}, r"hidden_size=34 is not a multiple"),
    ({"head_dim": 7}, r"head_dim=7 must be even"),
    ({"dtype": "float8"}, r"dtype='float8'.*bfloat16"),
    ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings='yes'.*True"),
    ({"eos_token_id": "</s>"}, r"eos_token_id='</s>'.*token id"),
    ({"bos_token_id": [1, 2]}, r"bos_token_id=\[1, 2\].*one token id"),
    ({"rms_norm_eps": -1}, r"rms_norm_eps=-1"),
    ({"model_type": "gpt_bigcode"}, r"model_type='gpt_bigcode'.*llama.*qwen2"),
    ({"model_type": "gpt2", "n_embd": 34}, r"n_embd=34.*n_head=4"),
    ({"model_type": "gpt2", "add_cross_attention": True}, r"add_cross_attention=True.*False"),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, r"layer_types.*each of 3"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_values_that_cannot_be_honoured_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        parsed(**changes)


@every_variant
def test_a_config_and_its_model_belong_to_one_family(name):
    written = parsed(name).to_hf()
    family = family_of(written)
    assert family_for(family.build(family.parse(written))) is family
    assert family_of({"architectures": written["architectures"]}) is family


@pytest.mark.parametrize(
    "hf",
    [
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {},
    ],
)
def test_unknown_architectures_are_refused_with_the_known_ones(hf):
    with pytest.raises(CheckpointError) as refusal:
        task_of(hf)
    assert all(name in str(refusal.value) for f in FAMILIES for name in f.heads)


def test_a_foreign_module_belongs_to_no_family():
    import flax.linen as nn

    with pytest.raises(TypeError, match="Dense belongs to no known family"):
        family_for(nn.Dense(3))
    assert issubclass(FAMILIES[0].module, LlamaForCausalLM)
