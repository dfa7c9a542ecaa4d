"""The memory of a training step where no compiler for the device is installed: shapes and tracing.

What is held throughout follows from shapes, and what the backward pass keeps from the gradient's
trace, both exactly. What is reckoned is the rest: how much a layer takes while it is worked on.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jqlora import tree
from jqlora.attach import bind
from jqlora.config import RunConfig
from jqlora.optim.offload import DEVICE, HOST
from jqlora.quant import QTensor
from jqlora.run.memory import Device, Memory, Present, Step, abstract_step, compile_step
from jqlora.train.by_chunks import chunk_length
from jqlora.train.residuals import residuals
from jqlora.train.task_loss import loss_for
from jqlora_kernels import aot

MATRICES = 2
"""Decoded matrices at once: one is multiplied by while the next is decoded."""
COPIES = 2
"""Of the outputs of a layer's projections: themselves, recomputed, and their gradients."""
SCORES = 3
"""Arrays of fp32 scores in XLA's attention: themselves, their softmax, its gradient."""


def step_memory(config: RunConfig, target: Device) -> Memory:
    """From the compiled program where the device can be compiled for, else an estimate."""
    reason = None if isinstance(target, Present) else aot.missing()
    if reason is None:
        return compile_step(config, target)
    return estimate_step(config, f"cannot compile for a device that is not here: {reason}")


def estimate_step(config: RunConfig, why: str) -> Memory:
    """As :func:`~jqlora.run.memory.compile_step`, reckoned, the same for all devices; ``why`` it
    was not compiled is said.

    Attention is taken to be cuDNN's wherever a GPU would use that.
    """
    step = abstract_step(config)
    parts = step.parts()
    scoreless = has_no_scores(step)
    accumulate = step.config.train.accumulate
    gradients = parts["adapters"]
    if accumulate > 1:  # a micro-batch's own, and the sum in fp32
        gradients += gradients * 4 // jnp.dtype(step.config.method.dtype).itemsize
    on_device, on_host = kept(step, scoreless=scoreless)
    temporaries = gradients + on_device + workspace(step, scoreless=scoreless)
    held = sum(size for name, size in parts.items() if name != "host")
    return Memory(
        **parts,
        temporaries=temporaries,
        peak=held + temporaries,
        scoreless=scoreless,
        host_activations=on_host,
        estimated=why,
    )


def has_no_scores(step: Step) -> bool:
    """Whether a GPU's attention would be cuDNN's or by blocks."""
    attention = step.model.attention
    config: Any = step.model.config
    plain = getattr(config, "attention_softcap", None) is None and step.model.task == "causal-lm"
    half = jnp.dtype(step.model.dtype).itemsize == 2
    fits = half and plain and config.head_dim % 8 == 0 and config.head_dim <= 128
    return attention in ("cudnn", "blockwise") or (attention == "auto" and fits)


def kept(step: Step, *, scoreless: bool) -> tuple[int, int]:
    """Bytes that the forward pass leaves to the backward pass on the device, and on the host;
    of scores none where attention is ``scoreless``."""
    rows = step.config.train.batch_size // step.config.train.accumulate
    batch = {
        name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in step.batch.items()
    }
    model = step.model.clone(attention="xla")
    adapters = jax.eval_shape(step.create).adapters
    found = residuals(bind(model, step.plan), loss_for(model), adapters, step.params, batch)
    if scoreless:
        length = step.config.data.length
        scores = (step.model.config.num_attention_heads, length, length)
        found = [leaf for leaf in found if leaf.shape[-3:] != scores]
    bytes_by_home = {HOST: 0, DEVICE: 0}
    for leaf in found:
        bytes_by_home[leaf.memory_space] += leaf.size * leaf.dtype.itemsize
    return bytes_by_home[DEVICE], bytes_by_home[HOST]


def workspace(step: Step, *, scoreless: bool) -> int:
    """Bytes of what takes more while it is worked on: a layer, or a chunk of the logits."""
    return max(of_layer(step, scoreless=scoreless), of_chunk(step))


def of_chunk(step: Step) -> int:
    """Bytes of a chunk of logits, as the head gives them and in fp32; 0 without a vocabulary."""
    task, data = step.model.task, step.config.data
    if task not in ("causal-lm", "masked-lm", "seq2seq-lm"):
        return 0
    rows = step.config.train.batch_size // step.config.train.accumulate
    vocabulary: int = step.model.config.vocab_size
    length = data.target_length if task == "seq2seq-lm" else data.length
    size = jnp.dtype(step.model.dtype).itemsize
    return rows * chunk_length(rows, length, vocabulary) * vocabulary * (size + 4)


def of_layer(step: Step, *, scoreless: bool) -> int:
    """Bytes of the largest layer: decoded matrices, activations and, if there are any, scores."""
    size = jnp.dtype(step.model.dtype).itemsize
    rows = step.config.train.batch_size // step.config.train.accumulate
    length = step.config.data.length
    stacks: dict[bool, list[tuple[int, ...]]] = {}
    for path, leaf in tree.flatten(step.params).items():
        if isinstance(leaf, QTensor) or leaf.ndim == 3:
            shape = leaf.matrix_shape if isinstance(leaf, QTensor) else leaf.shape[-2:]
            stacks.setdefault("decoder" in path, []).append(shape)
    largest = max((math.prod(shape) for shapes in stacks.values() for shape in shapes), default=0)
    outputs = max((sum(shape[1] for shape in shapes) for shapes in stacks.values()), default=0)
    activations = COPIES * outputs * rows * length * size
    heads = step.model.config.num_attention_heads
    scores = 0 if scoreless else SCORES * rows * heads * length**2 * 4
    return MATRICES * largest * size + activations + scores
