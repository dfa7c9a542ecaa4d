"""Every kind of checkpoint the families read, one row each; a new row inherits every check.

A row is what distinguishes a tiny config.json; ``checkpoint`` makes transformers build the model,
fills it with weights large enough for every part to matter, and gives ours beside it.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.models import family_of
from jqlora.tree import unflatten

TINY = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
ROWS: dict[str, dict[str, Any]] = {
    "llama2_mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3_gqa_scaled": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama_linear_rope": {"model_type": "llama", **rope("linear", factor=2.5)},
    "llama_dynamic_rope": {
        "model_type": "llama",
        "max_position_embeddings": 8,
        **rope("dynamic", factor=4.0),
    },
    "llama_yarn_mqa": {"model_type": "llama", "num_key_value_heads": 1, "rope_parameters": YARN},
    "llama_biases_gelu": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
    },
    "smollm2_tied": {
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 24,
        "tie_word_embeddings": True,
        **rope("default", rope_theta=100000.0),
    },
    "mistral_window": {"model_type": "mistral", "sliding_window": 5},
    "mistral_wide_heads": {
        "model_type": "mistral",
        "sliding_window": None,
        "head_dim": 24,
        "rms_norm_eps": 1e-3,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "qwen2_tied": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        **rope("default", rope_theta=1000000.0),
    },
    "qwen2_upper_layers_windowed": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen2_layer_types": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": LAYER_TYPES,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 12,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "gemma": {
        "model_type": "gemma",
        "head_dim": 12,
        "num_key_value_heads": 1,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 12,
        "query_pre_attn_scalar": 5,
        "sliding_window": 4,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "head_dim": 12,
        "query_pre_attn_scalar": 7,
        "sliding_window": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "phi3_longrope": {
        "model_type": "phi3",
        "sliding_window": 6,
        "original_max_position_embeddings": 10,
        **rope(
            "longrope",
            short_factor=[1.0, 1.25, 1.5],
            long_factor=[1.0, 3.0, 7.5],
            partial_rotary_factor=0.75,
        ),
    },
    "gpt2": {"model_type": "gpt2", "tie_word_embeddings": True},
    "gpt2_scaled_by_layer": {
        "model_type": "gpt2",
        "n_inner": 40,
        "activation_function": "relu",
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "layer_norm_epsilon": 1e-3,
    },
}


class Checkpoint(NamedTuple):
    hf: Any  # transformers' model, float32, eager attention
    config: dict[str, Any]  # as transformers writes config.json
    model: Any
    params: dict[str, Any]


def params_from(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """Our parameters from a torch state dict, by the names of the model's family."""
    leaves: dict[Any, Any] = {}
    for name in family_of(model.config.to_hf()).hf_names(model):
        tensor = state[name.hf].detach().float().numpy()
        tensor = tensor.T if name.transpose else tensor
        if name.index is None:
            leaves[name.path] = jnp.asarray(tensor)
        else:
            leaves.setdefault(name.path, []).append(tensor)
    stacked = {p: jnp.asarray(np.stack(v)) if isinstance(v, list) else v for p, v in leaves.items()}
    return unflatten(stacked)


@functools.cache
def checkpoint(name: str) -> Checkpoint:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    row = TINY | ROWS[name]
    config = transformers.AutoConfig.for_model(**row)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, weight in hf.named_parameters():
            center, spread = (1.0, 0.2) if "norm" in key or ".ln_" in key else (0.0, 0.25)
            weight.normal_(center, spread, generator=generator)
    written = config.to_dict() | {"architectures": [type(hf).__name__]}
    family = family_of(written)
    model = family.build(family.parse(written), dtype=jnp.float32)
    return Checkpoint(hf, written, model, params_from(hf.state_dict(), model))


def hf_run(hf: Any, ids: Any, **options: Any) -> Any:
    """transformers' output for numpy inputs, without gradients."""
    import torch

    tensors = {k: torch.tensor(np.asarray(v)) for k, v in options.items()}
    with torch.no_grad():
        return hf(torch.tensor(np.asarray(ids)), **tensors, output_hidden_states=True)


def ids(batch: int, length: int, *, seed: int = 0, vocab: int = TINY["vocab_size"]) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, (batch, length)).astype(np.int32)


def gap(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the range of what is expected."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / (theirs.max() - theirs.min()))
