"""Models and adapters from and to files: Hugging Face directories, GGUF, bitsandbytes, PEFT."""

from jqlora.io.cache import Cache
from jqlora.io.layout import abstract_params
from jqlora.io.load import describe, fresh_head, load
from jqlora.io.peft import load_adapter, save_adapter
from jqlora.io.quantize_files import quantize_checkpoint
from jqlora.io.save import save_pretrained
from jqlora.io.tokenizer import load_tokenizer

__all__ = [
    "Cache",
    "abstract_params",
    "describe",
    "fresh_head",
    "load",
    "load_adapter",
    "load_tokenizer",
    "quantize_checkpoint",
    "save_adapter",
    "save_pretrained",
]
