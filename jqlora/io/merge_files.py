"""An adapter folded into a checkpoint from files to files, one tensor in memory at a time.

The result is what ``load``, ``load_adapter``, ``merge`` and ``save_pretrained`` would write,
without holding the model. A matrix that the source stores quantized is decoded, so that no second
rounding follows. An adapter that was trained with another head than the source's brings it along:
the result is a checkpoint of that head.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jqlora.errors import ConfigError, MergeError
from jqlora.io.adapter_head import head_of
from jqlora.io.atomic import atomic_directory, atomic_write_json
from jqlora.io.checkpoint import open_checkpoint
from jqlora.io.layout import Layout, lay_out
from jqlora.io.peft import load_adapter
from jqlora.io.place import read_float
from jqlora.io.quantize_files import config_of, head_config, write_companions
from jqlora.io.readers import TensorInfo
from jqlora.io.save import MAX_SHARD_BYTES
from jqlora.io.shards import Group, write_weights
from jqlora.io.source import Source, resolve
from jqlora.merging import check_mergeable, delta
from jqlora.methods import FULL, Placement, Plan
from jqlora.models import HFName
from jqlora.quant import QTensor
from jqlora.quant.params import SKIP
from jqlora.tree import flatten, unflatten
from jqlora.types import Path as TreePath
from jqlora.types import Progress


def merge_checkpoint(
    source: str | Source,
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write ``source`` with the PEFT directory ``adapter`` folded in to the directory ``out``.

    transformers loads the result as an ordinary model, with the head that the adapter was trained
    with. ``dtype`` is that of the written weights; None keeps the source's own. Raises what
    ``load`` and ``load_adapter`` raise, and :class:`MergeError` for what cannot be merged, such as
    a head that neither the source nor the adapter has whole.
    """
    found = resolve(source)
    if Path(out).resolve() in (found.folder.resolve(), Path(adapter).resolve()):
        raise ConfigError(f"{out} is where an input is; write the merged model elsewhere")
    checkpoint = open_checkpoint(found, **head_of(adapter))
    name = checkpoint.dtype(dtype)
    model = checkpoint.model(name)
    layout = lay_out(checkpoint, model, None, SKIP)
    plan, adapters = load_adapter(adapter, model, unflatten(dict(layout.leaves)))
    check_mergeable(plan)
    _check_head(layout.fresh, plan, found)
    placements = {placement.site.leaf_path: placement for placement in plan.placements}
    weights = _Weights(layout, adapters, placements, np.dtype(jnp.dtype(name)))
    config = config_of(checkpoint, model, name)
    config.pop("quantization_config", None)
    if checkpoint.other_head:
        config |= head_config(checkpoint, model)
    with atomic_directory(out) as folder:
        write_companions(found, config, folder)
        groups = [weights.group(item) for item in (*layout.tensors, *layout.fresh)]
        write_weights(folder, groups, max_shard_bytes=max_shard_bytes, progress=progress)
        atomic_write_json(folder / "config.json", config)


def _check_head(fresh: Sequence[HFName], plan: Plan, source: Source) -> None:
    """What the source lacks must have been trained whole: all else of it was random."""
    given = {leaf.path for leaf in plan.full}
    missing = [item.hf for item in fresh if item.path not in given]
    if missing:
        raise MergeError(
            f"{source.label} has no {', '.join(missing)}, and the adapter did not train "
            f"{'it' if len(missing) == 1 else 'them'} whole (modules_to_save)"
        )


class _Weights:
    """The merged tensors of a checkpoint, made one by one as they are written."""

    def __init__(
        self,
        layout: Layout,
        adapters: Mapping[str, Any],
        placements: Mapping[TreePath, Placement],
        dtype: np.dtype,
    ):
        self._reader = layout.reader
        self._stored = layout.stored
        self._adapters = adapters
        self._full = flatten(adapters.get(FULL, {}))
        self._placements = placements
        self._dtype = dtype

    def group(self, item: HFName) -> Group:
        stored = self._stored.get(item.hf)
        if item.path in self._full:
            leaf = self._full[item.path]
            shape = np.shape(leaf if item.index is None else leaf[item.index])
            shape = shape[::-1] if item.transpose else shape
        elif stored is None:
            shape = self._reader.info(item.hf).shape
        else:
            shape = stored.matrix_shape[::-1] if item.transpose else stored.matrix_shape
        return Group(
            {item.hf: TensorInfo(tuple(shape), self._dtype)}, lambda: {item.hf: self._merged(item)}
        )

    def _merged(self, item: HFName) -> np.ndarray:
        weight = self._base(item)
        placement = self._placements.get(item.path)
        layer = item.index or 0
        if placement is not None and placement.layers[layer]:
            added = np.asarray(delta(placement, self._adapters, layer))
            weight = weight.astype(np.float32) + (added.T if item.transpose else added)
        return weight.astype(self._dtype)

    def _base(self, item: HFName) -> np.ndarray:
        """The tensor as it is stored, decoded and rounded to the dtype as loading would."""
        if item.path in self._full:
            leaf = self._full[item.path]
            array = np.asarray(leaf if item.index is None else leaf[item.index])
            array = array.T if item.transpose else array
        elif (stored := self._stored.get(item.hf)) is not None:
            array = np.asarray(_decoded(stored.read(), rows=item.transpose))
        else:
            array = read_float(self._reader, item.hf)
        return array.astype(self._dtype)


@functools.partial(jax.jit, static_argnames="rows")  # one program for all tensors of a shape
def _decoded(codes: QTensor, *, rows: bool) -> jax.Array:
    """W as the file has it: its rows outputs, or inputs."""
    return codes.dequantize_rows() if rows else codes.dequantize()
