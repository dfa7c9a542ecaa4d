"""Our side of a comparison: the model, the loss and the training step that ``jqlora`` trains with.

Tensors are named by what ``save_adapter`` calls them, so that PEFT's names are compared with those
of the files and no second table of names exists.
"""

import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jqlora import optim
from jqlora.attach import bind, init
from jqlora.compare.observation import Arrays, Batch, Observation, Recipe, seen_in
from jqlora.io.peft import WEIGHTS_FILE, save_adapter
from jqlora.methods import LoRA, Plan
from jqlora.train import TrainState, loss_for, make_train_step
from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, Params

SPREAD = 0.02
"""Standard deviation of a fresh adapter's B, whose zeros would leave A without a gradient."""
WHOLE = {
    "sequence-classification": ("classifier",),
    "token-classification": ("classifier",),
    "question-answering": ("qa_outputs",),
}
"""Heads that PEFT trains whole beside every adapter of such a task."""


def fresh_spec(task: str, rank: int) -> LoRA:
    """LoRA on every linear layer, and on what else PEFT trains for ``task``."""
    return LoRA(
        rank=rank, alpha=2 * rank, targets="all-linear", modules_to_save=WHOLE.get(task, ())
    )


def fresh_adapters(plan: Plan, params: Params, seed: int) -> Adapters:
    """Adapters that are zero nowhere, fp32."""
    first, second = jax.random.split(jax.random.key(seed))
    flat = flatten(init(first, plan, params))
    for number, path in enumerate(sorted(flat)):
        if path[0] == "lora" and path[-1] == "b":
            key = jax.random.fold_in(second, number)
            flat[path] = SPREAD * jax.random.normal(key, flat[path].shape)
    return unflatten(flat)


def by_file_names(plan: Plan, tree: Adapters, model: nn.Module) -> Arrays:
    """The leaves of adapters, or of anything shaped like them, under the names of PEFT's files."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder) / "tree", plan, tree, model=model)
        return load_file(Path(folder) / "tree" / WEIGHTS_FILE)


class OurSide:
    """A model with a plan, compiled for batches of one shape."""

    def __init__(self, model: nn.Module, plan: Plan, recipe: Recipe):
        self._model, self._plan, self._steps = model, plan, recipe.steps
        self._tx = optim.adamw(
            recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            max_grad_norm=None,
        )
        apply, loss = bind(model, plan), loss_for(model)

        def objective(adapters: Adapters, params: Params, batch: Any) -> Any:
            outputs: list[Any] = []

            def watched(*args: Any, **kwargs: Any) -> Any:
                outputs.append(apply(*args, **kwargs, output_hidden_states=True))
                return outputs[-1]

            total, count = loss(watched, {"params": params, **adapters}, batch, None)
            return total / count + apply.penalty(adapters), outputs[0]

        self._gradient = jax.jit(jax.grad(objective, has_aux=True))
        self._step = make_train_step(apply, self._tx, loss=loss)

    def observe(
        self,
        params: Params,
        adapters: Adapters,
        batches: list[Batch],
        *,
        steps: int | None = None,
        say: Any = None,
    ) -> Observation:
        """Run and train on ``batches`` in turn, for the recipe's steps unless told otherwise."""
        steps = self._steps if steps is None else steps
        gradients, output = self._gradient(adapters, params, _arrays(batches[0]))
        hidden, logits = seen_in(output, batches[0], _numpy)
        del output
        gradients = self._named(gradients)
        losses = []
        state = TrainState.create(adapters, self._tx, jax.random.key(0))
        for number in range(steps):
            batch = _arrays(batches[number % len(batches)])
            state, metrics = self._step(state, params, batch)
            losses.append(float(metrics["loss"] + metrics["penalty"]))
            if say is not None:
                say(number + 1, steps)
        before, after = self._named(adapters), self._named(state.adapters)
        return Observation(hidden, logits, gradients, losses, before, after)

    def _named(self, tree: Adapters) -> Arrays:
        return by_file_names(self._plan, tree, self._model)


def _arrays(batch: Batch) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, batch.ours)


def _numpy(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32)
