"""Optimizers and schedules: optax transformations, chosen and chained for adapter training.

Nothing here replaces optax. Any ``optax.GradientTransformation`` can be handed to
``jq.make_train_step``; these functions only spell the usual choices once.
"""

from jqlora.optim.adalora import adalora
from jqlora.optim.adamw import adamw, decayed
from jqlora.optim.schedules import SCHEDULES, constant, cosine, linear

__all__ = ["SCHEDULES", "adalora", "adamw", "constant", "cosine", "decayed", "linear"]
