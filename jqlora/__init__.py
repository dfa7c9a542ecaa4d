"""Fine-tune Hugging Face language models in JAX: LoRA, AdaLoRA, QLoRA.

The names below are the public surface; everything else may change.
"""

__version__ = "0.1.0"
