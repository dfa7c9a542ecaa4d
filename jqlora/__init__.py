"""Fine-tune Hugging Face language models in JAX: LoRA and QLoRA, and adapters that PEFT loads.

The names below are the public surface; everything else may change. They are imported when first
used, so that ``jqlora --help`` need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jqlora import data, optim
    from jqlora.attach import bind, init, plan
    from jqlora.compacting import as_lora, compact
    from jqlora.generation import generate
    from jqlora.io import (
        Cache,
        abstract_params,
        load,
        load_adapter,
        load_tokenizer,
        save_adapter,
        save_pretrained,
    )
    from jqlora.merging import merge
    from jqlora.methods import AdaLoRA, LoRA, Plan
    from jqlora.quant import FP4, INT8, NF4, QTensor, footprint, quantize_params
    from jqlora.stacking import stack
    from jqlora.train import TrainState, loss_for, make_train_step

__all__ = [
    "FP4",
    "INT8",
    "NF4",
    "AdaLoRA",
    "Cache",
    "LoRA",
    "Plan",
    "QTensor",
    "TrainState",
    "abstract_params",
    "as_lora",
    "bind",
    "compact",
    "data",
    "footprint",
    "generate",
    "init",
    "load",
    "load_adapter",
    "load_tokenizer",
    "loss_for",
    "make_train_step",
    "merge",
    "optim",
    "plan",
    "quantize_params",
    "save_adapter",
    "save_pretrained",
    "stack",
]

_HOMES = {
    "jqlora.attach": ("bind", "init", "plan"),
    "jqlora.compacting": ("as_lora", "compact"),
    "jqlora.generation": ("generate",),
    "jqlora.io": (
        "Cache",
        "abstract_params",
        "load",
        "load_adapter",
        "load_tokenizer",
        "save_adapter",
        "save_pretrained",
    ),
    "jqlora.merging": ("merge",),
    "jqlora.methods": ("AdaLoRA", "LoRA", "Plan"),
    "jqlora.quant": ("FP4", "INT8", "NF4", "QTensor", "footprint", "quantize_params"),
    "jqlora.stacking": ("stack",),
    "jqlora.train": ("TrainState", "loss_for", "make_train_step"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("data", "optim"):
        return importlib.import_module(f"jqlora.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jqlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
