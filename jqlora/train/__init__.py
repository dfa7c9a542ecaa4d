"""Training: the loss, the step, the loop around it, and what a run leaves behind."""

from jqlora.train.loss import causal_lm_loss, cross_entropy
from jqlora.train.state import TrainState
from jqlora.train.step import make_train_step
from jqlora.train.task_loss import loss_for

__all__ = ["TrainState", "causal_lm_loss", "cross_entropy", "loss_for", "make_train_step"]
