"""Decoder language models in plain Flax Linen, and where their checkpoints' tensors belong."""

from jqlora.models.config import LlamaConfig
from jqlora.models.families import (
    FAMILIES,
    Family,
    HFName,
    abstract_params,
    family_for,
    family_of,
)
from jqlora.models.layers import loop_to_scan, scan_to_loop
from jqlora.models.llama import LlamaForCausalLM
from jqlora.models.outputs import CausalLMOutput, KVCache

__all__ = [
    "FAMILIES",
    "CausalLMOutput",
    "Family",
    "HFName",
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "abstract_params",
    "family_for",
    "family_of",
    "loop_to_scan",
    "scan_to_loop",
]
