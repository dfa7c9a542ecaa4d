"""A Hugging Face config out of the metadata of a GGUF file."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jqlora.errors import CheckpointError
from jqlora.io.readers.gguf_header import GGUFHeader, field

_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# The one size of each Gemma whose scores are scaled by another width than a head's: llama.cpp too
# tells it by its number of layers.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# Llama 3.1 and later all share these; GGUF keeps only what follows from them.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_from_gguf(header: GGUFHeader) -> dict[str, Any]:
    """The content of a ``config.json`` for this file, in the spelling of the hub's older files.

    ``torch_dtype`` is the type of the matrices if they are stored plainly (F32, F16, BF16), and
    float32 if they are block-quantized: that is what decodes them without loss.
    Raises CheckpointError for an unknown architecture or missing metadata.
    """
    kind = field(header, "general.architecture")
    if kind not in _MODEL_TYPES:
        raise CheckpointError(
            f"unknown GGUF architecture {kind!r}; known are {', '.join(sorted(_MODEL_TYPES))}"
        )

    def value(key: str, default: Any = ...) -> Any:
        return field(header, f"{kind}.{key}", default)

    tensors = {tensor.name: tensor for tensor in header.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError("the GGUF file has no tensor 'token_embd.weight'")
    heads = value("attention.head_count")
    shared = {
        "architectures": [_MODEL_TYPES[kind]],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": _matrix_dtype(header),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        shared[f"{name}_token_id"] = field(header, f"tokenizer.ggml.{key}_token_id", None)
    if kind == "gpt2":
        return shared | _gpt2(value)
    head_dim = value("attention.key_length", value("embedding_length") // heads)
    theta = value("rope.freq_base", 10000.0)
    config = {
        "model_type": kind,
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": _shortest(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, kind, head_dim, theta),
    }
    if kind.startswith("gemma"):
        config |= _gemma(kind, value, head_dim)
    if kind == "phi3":
        config |= _phi3(header, value, head_dim)
    return shared | config


def _gpt2(value: Callable[..., Any]) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": value("embedding_length"),
        "n_inner": value("feed_forward_length"),
        "n_layer": value("block_count"),
        "n_head": value("attention.head_count"),
        "n_positions": value("context_length"),
        "layer_norm_epsilon": _shortest(value("attention.layer_norm_epsilon")),
    }


def _gemma(kind: str, value: Callable[..., Any], head_dim: int) -> dict[str, Any]:
    """What a Gemma's config says beyond a Llama's; the rest is the same in all sizes."""
    activation = "gelu_pytorch_tanh"
    if kind == "gemma":
        return {"hidden_act": activation}
    scalar = head_dim
    if value("block_count") == _LAYERS_OF_27B[kind]:
        scalar = value("embedding_length") // value("attention.head_count")
    caps = {
        "attn_logit_softcapping": value("attn_logit_softcapping", None),
        "final_logit_softcapping": value("final_logit_softcapping", None),
    }
    return {
        **caps,
        "model_type": {"gemma2": "gemma2", "gemma3": "gemma3_text"}[kind],
        "hidden_activation": activation,
        "query_pre_attn_scalar": scalar,
        "sliding_window": value("attention.sliding_window"),
    }


def _phi3(header: GGUFHeader, value: Callable[..., Any], head_dim: int) -> dict[str, Any]:
    """A window, 0 for none; a part of each head that is rotated; the two sets of LongRoPE."""
    config: dict[str, Any] = {
        "sliding_window": value("attention.sliding_window", None) or None,
        "partial_rotary_factor": value("rope.dimension_count", head_dim) / head_dim,
    }
    factors = {
        length: [float(str(f)) for f in header.read(tensor).view(np.float32)]
        for length in ("short", "long")
        for tensor in header.tensors
        if tensor.name == f"rope_factors_{length}.weight"
    }
    if factors:
        original = value("rope.scaling.original_context_length")
        sets = {f"{length}_factor": values for length, values in factors.items()}
        config |= {
            "rope_scaling": {"rope_type": "longrope", **sets},
            "original_max_position_embeddings": original,
        }
    return config


def _shortest(value: float) -> float:
    """1e-5 stored as float32 reads 9.99999974e-06: the shortest decimal of that float32."""
    return float(str(np.float32(value)))


def _matrix_dtype(header: GGUFHeader) -> str:
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = {t.kind.name for t in header.tensors if len(t.shape) > 1}
    return names.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _rope_scaling(header: GGUFHeader, kind: str, head_dim: int, theta: float) -> dict | None:
    scaling = field(header, f"{kind}.rope.scaling.type", "none")
    if scaling == "linear":
        return {"rope_type": "linear", "factor": field(header, f"{kind}.rope.scaling.factor")}
    if scaling != "none":
        raise CheckpointError(f"rope scaling {scaling!r} of this GGUF file is not supported")
    stored = [tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight"]
    if not stored:
        return None
    divisors = header.read(stored[0]).view(np.float32).astype(np.float64)
    return _llama3_rope(divisors, head_dim, theta)


def _llama3_rope(divisors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any]:
    """Recover Llama 3's rope scaling from its per-frequency divisors [head_dim/2], and verify it.

    Frequencies of long wavelength are divided by ``factor``, short ones left alone, with a linear
    ramp between (the ``llama3`` rule of transformers' modeling_rope_utils).
    """
    rule = {**_LLAMA3_ROPE, "factor": float(divisors.max())}
    low, high, factor = rule["low_freq_factor"], rule["high_freq_factor"], rule["factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    ramp = (rule["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    ramp = np.clip(ramp, 0.0, 1.0)
    expected = 1 / ((1 - ramp) / factor + ramp)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise CheckpointError("the tensor 'rope_freqs.weight' does not follow Llama 3's rope rule")
    return rule
