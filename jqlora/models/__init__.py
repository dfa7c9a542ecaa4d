"""Language models in plain Flax Linen, and where their checkpoints' tensors belong."""

from jqlora.models.bart import BartForTask
from jqlora.models.bart_config import BartConfig
from jqlora.models.config import LlamaConfig
from jqlora.models.families import (
    FAMILIES,
    Family,
    abstract_params,
    family_for,
    family_of,
    task_of,
)
from jqlora.models.gpt2 import GPT2LMHeadModel
from jqlora.models.gpt2_config import GPT2Config
from jqlora.models.layers import loop_to_scan, scan_to_loop
from jqlora.models.llama import LlamaForCausalLM
from jqlora.models.names import HFName, Naming
from jqlora.models.outputs import CausalLMOutput, KVCache, Seq2SeqCache, Seq2SeqLMOutput
from jqlora.models.t5_config import T5Config
from jqlora.models.t5_model import T5ForTask
from jqlora.models.tasks import TASKS

__all__ = [
    "FAMILIES",
    "TASKS",
    "BartConfig",
    "BartForTask",
    "CausalLMOutput",
    "Family",
    "GPT2Config",
    "GPT2LMHeadModel",
    "HFName",
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "Naming",
    "Seq2SeqCache",
    "Seq2SeqLMOutput",
    "T5Config",
    "T5ForTask",
    "abstract_params",
    "family_for",
    "family_of",
    "loop_to_scan",
    "scan_to_loop",
    "task_of",
]
