"""Our side of a comparison: the model, the loss and the training step that ``jqlora`` trains with.

Tensors are named by what ``save_adapter`` calls them, so that PEFT's names are compared with those
of the files and no second table of names exists.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from jqlora import optim
from jqlora.attach import bind, init
from jqlora.compare.observation import Arrays, Batch, Observation, Recipe, seen_in
from jqlora.graft import dense
from jqlora.io.peft import WEIGHTS_FILE, save_adapter
from jqlora.methods import FULL, LoRA, Plan
from jqlora.models.tasks import trained_whole
from jqlora.train import TrainState, loss_for, make_train_step
from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, Params

SPREAD = 0.02
"""Standard deviation of a fresh adapter's B, whose zeros would leave A without a gradient."""


def fresh_spec(task: str, params: Params, rank: int) -> LoRA:
    """LoRA on every linear layer, and on what else PEFT trains for ``task``."""
    whole = trained_whole(task, params)
    return LoRA(rank=rank, alpha=2 * rank, targets="all-linear", modules_to_save=whole)


def fresh_adapters(plan: Plan, params: Params, seed: int) -> Adapters:
    """Adapters that are zero nowhere, fp32, drawn without compiling anything."""
    generator = np.random.default_rng(seed)
    drawn = dataclasses.replace(plan, full=())
    shapes = flatten(jax.eval_shape(lambda: init(jax.random.key(0), drawn)))
    flat = {}
    for path, leaf in sorted(shapes.items()):
        spread = SPREAD if path[-1] == "b" else (3 * leaf.shape[-2]) ** -0.5  # of PEFT's own draw
        flat[path] = jnp.asarray(generator.normal(0, spread, leaf.shape), jnp.float32)
    base = flatten(params)
    for leaf in plan.full:
        flat[(FULL, *leaf.path)] = jnp.array(dense(base[leaf.path]), jnp.float32, copy=True)
    return unflatten(flat)


def by_file_names(plan: Plan, tree: Adapters, model: nn.Module) -> Arrays:
    """The leaves of adapters, or of anything shaped like them, under the names of PEFT's files."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder) / "tree", plan, tree, model=model)
        return load_file(Path(folder) / "tree" / WEIGHTS_FILE)


class _Kept(NamedTuple):
    gradients: Any


def keeping() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradients, so that the step's own can be looked at."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del state, params
        return updates, _Kept(updates)

    def zeros(params: Any) -> Any:
        return _Kept(jax.tree.map(jnp.zeros_like, params))

    return optax.GradientTransformation(zeros, update)


class Trained(NamedTuple):
    """Gradients of the first step, the loss of each, and the adapters after the last."""

    gradients: Arrays
    losses: list[float]
    after: Arrays


class OurSide:
    """A model with a plan, compiled for batches of one shape."""

    def __init__(self, model: nn.Module, plan: Plan, recipe: Recipe):
        self._model, self._plan, self._steps = model, plan, recipe.steps
        adamw = optim.adamw(
            recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            max_grad_norm=None,
        )
        self._tx = optax.chain(keeping(), adamw)
        apply, loss = bind(model, plan), loss_for(model)

        def forward(adapters: Adapters, params: Params, batch: Any) -> Any:
            outputs: list[Any] = []

            def watched(*args: Any, **kwargs: Any) -> Any:
                outputs.append(apply(*args, **kwargs, output_hidden_states=True))
                return outputs[-1]

            loss(watched, {"params": params, **adapters}, batch, None)  # knows how to call it
            return outputs[0]

        self._forward = jax.jit(forward)
        self._step = make_train_step(apply, self._tx, loss=loss)

    def observe(
        self, params: Params, adapters: Adapters, batches: list[Batch], *, say: Any = None
    ) -> Observation:
        """Run on the first of ``batches``, then :meth:`train` on them."""
        output = self._forward(adapters, params, _arrays(batches[0]))
        hidden, logits = seen_in(output, batches[0], _numpy)
        del output
        trained = self.train(params, adapters, batches, say=say)
        before = self._named(adapters)
        return Observation(hidden, logits, trained.gradients, trained.losses, before, trained.after)

    def train(
        self,
        params: Params,
        adapters: Adapters,
        batches: list[Batch],
        *,
        steps: int | None = None,
        say: Any = None,
    ) -> Trained:
        """Train on ``batches`` in turn, for the recipe's steps unless told otherwise."""
        steps = self._steps if steps is None else steps
        gradients, losses = {}, []
        state: Any = TrainState.create(adapters, self._tx, jax.random.key(0))
        for number in range(steps):
            batch = _arrays(batches[number % len(batches)])
            state, metrics = self._step(state, params, batch)
            losses.append(float(metrics["loss"] + metrics["penalty"]))
            if number == 0:
                gradients = self._named(state.opt_state[0].gradients)
            if say is not None:
                say(number + 1, steps)
        return Trained(gradients, losses, self._named(state.adapters))

    def _named(self, tree: Adapters) -> Arrays:
        return by_file_names(self._plan, tree, self._model)


def _arrays(batch: Batch) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, batch.ours)


def _numpy(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32)
