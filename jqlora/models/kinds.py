"""The kinds of Llama-like decoders: what each computes, and how its config.json spells it.

One row for each ``model_type``. ``switches`` are fields of ``LlamaConfig`` that the kind fixes,
``defaults`` are transformers' for keys that a config.json may lack.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jqlora.models import windows
from jqlora.models.hf_keys import refuse
from jqlora.models.hf_rope import COMMON, RopeKeys


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one ``model_type`` spells what is common to all.

    ``activation_keys`` name the activation, the first is the one that is read;
    ``tanh_gelu`` says that "gelu" means its tanh approximation. ``query_scalar`` says that a
    config.json sets the scale of scores and may cap logits, ``capped_scores`` that it may cap
    scores.
    """

    name: str
    architecture: str
    switches: Mapping[str, bool] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    attention_bias: bool = False
    mlp_bias: bool = False
    activation_keys: tuple[str, ...] = ("hidden_act",)
    tanh_gelu: bool = False
    query_scalar: bool = False
    capped_scores: bool = False
    rope: RopeKeys = COMMON
    read_window: windows.ReadWindow = windows.no_window
    write_window: windows.WriteWindow = windows.write_nothing


_GEMMA = {"unit_offset_norms": True, "scaled_embedding": True}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="llama",
            architecture="LlamaForCausalLM",
            attention_bias=True,
            mlp_bias=True,
        ),
        Kind(
            name="mistral",
            architecture="MistralForCausalLM",
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 4096 * 32,
                "sliding_window": 4096,
            },
            read_window=windows.window_everywhere,
            write_window=windows.write_everywhere,
        ),
        Kind(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            switches={"qkv_bias": True},
            defaults=_QWEN,
            read_window=windows.window_above,
            write_window=windows.write_above,
        ),
        Kind(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            switches={"qk_norm": True},
            defaults=_QWEN | {"head_dim": 128},
            attention_bias=True,
            read_window=windows.window_above,
            write_window=windows.write_above,
        ),
        Kind(
            name="gemma",
            architecture="GemmaForCausalLM",
            switches=_GEMMA,
            defaults=_GEMMA_DEFAULTS
            | {
                "hidden_act": "gelu_pytorch_tanh",
                "num_key_value_heads": 16,
                "max_position_embeddings": 8192,
            },
            attention_bias=True,
            activation_keys=("hidden_act", "hidden_activation"),
            tanh_gelu=True,
        ),
        Kind(
            name="gemma2",
            architecture="Gemma2ForCausalLM",
            switches=_GEMMA | {"sandwich_norms": True},
            defaults=_GEMMA2_DEFAULTS
            | {
                "max_position_embeddings": 8192,
                "final_logit_softcapping": 30.0,
                "attn_logit_softcapping": 50.0,
            },
            attention_bias=True,
            activation_keys=("hidden_activation",),
            query_scalar=True,
            capped_scores=True,
            read_window=windows.window_alternating,
            write_window=windows.write_pattern,
        ),
        Kind(
            name="gemma3_text",
            architecture="Gemma3ForCausalLM",
            switches=_GEMMA | {"sandwich_norms": True, "qk_norm": True},
            defaults=_GEMMA2_DEFAULTS | {"max_position_embeddings": 131072},
            attention_bias=True,
            activation_keys=("hidden_activation",),
            query_scalar=True,
            rope=RopeKeys(theta=1000000.0, local_theta=10000.0),
            read_window=windows.window_five_of_six,
            write_window=windows.write_pattern,
        ),
        Kind(
            name="phi3",
            architecture="Phi3ForCausalLM",
            switches={"fused_projections": True},
            defaults={
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "bos_token_id": 1,
                "eos_token_id": 32000,
                "pad_token_id": 32000,
            },
            rope=RopeKeys(longrope_names=("su", "yarn"), partial=True),
            read_window=windows.window_everywhere,
            write_window=windows.write_everywhere,
        ),
    )
}


def kind_of(hf: Mapping[str, Any]) -> Kind:
    """The row of a config.json; CheckpointError for another ``model_type``."""
    name = hf.get("model_type")
    if name not in KINDS:
        refuse("model_type", name, KINDS)
    return KINDS[name]
