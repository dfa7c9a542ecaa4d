"""Optimizers and schedules: optax transformations, chosen and chained for adapter training.

Nothing here replaces optax. Any ``optax.GradientTransformation`` can be handed to
``jq.make_train_step``; these functions only spell the usual choices once.
"""

from jqlora.optim.adalora import adalora
from jqlora.optim.by_factor import lora_fa, lora_plus
from jqlora.optim.chains import adafactor, adamw, clipped, decayed, lion, sgd
from jqlora.optim.eight_bit import eight_bit
from jqlora.optim.offload import offload
from jqlora.optim.rounding import sixteen_bit
from jqlora.optim.schedules import SCHEDULES, constant, cosine, linear

__all__ = [
    "SCHEDULES",
    "adafactor",
    "adalora",
    "adamw",
    "clipped",
    "constant",
    "cosine",
    "decayed",
    "eight_bit",
    "linear",
    "lion",
    "lora_fa",
    "lora_plus",
    "offload",
    "sgd",
    "sixteen_bit",
]
