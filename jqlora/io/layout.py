"""Which tensor of a checkpoint becomes which leaf: everything checked before anything is read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jqlora import models, tree
from jqlora.errors import CheckpointError
from jqlora.io import formats, grouped
from jqlora.io.checkpoint import Checkpoint
from jqlora.io.readers import TensorReader
from jqlora.io.readers.renamed import Renamed
from jqlora.io.stored import Stored
from jqlora.models import HFName
from jqlora.quant import BlockQuant, empty, quantize_params
from jqlora.quant.params import SKIP
from jqlora.types import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """``tensors`` in reading order; ``stored`` has those that the file holds quantized.

    ``reader`` has them under their present names. ``leaves`` are the shapes of the result:
    ``ShapeDtypeStruct``, or ``QTensor`` of them. ``fresh`` are parameters of a head that the
    checkpoint is without, which are to be drawn at random.
    """

    reader: TensorReader
    tensors: tuple[HFName, ...]
    fresh: tuple[HFName, ...]
    stored: Mapping[str, Stored]
    leaves: Mapping[Path, Any]


def abstract_params(
    model: nn.Module, quantize: BlockQuant | None = None, *, skip: tuple[str, ...] = SKIP
) -> dict[str, Any]:
    """The shapes of what ``load`` would return for ``model``, nothing allocated.

    Leaves are ``jax.ShapeDtypeStruct``; with ``quantize`` the kernels of dense layers are
    ``QTensor`` of them, except those with a part of their path in ``skip``.
    """
    shapes = models.abstract_params(model)
    return shapes if quantize is None else quantize_params(shapes, quantize, skip)


def lay_out(
    checkpoint: Checkpoint,
    model: nn.Module,
    quantize: BlockQuant | None,
    skip: tuple[str, ...],
) -> Layout:
    """Match the checkpoint's tensors with the model's leaves.

    Where the checkpoint has another head than the model, or none, the model's is ``fresh`` and the
    checkpoint's is passed over. Raises CheckpointError naming file and tensor if one is missing,
    extra or misshapen, and ConfigError for ``quantize`` of a checkpoint that is quantized already.
    """
    settings, naming = formats.settings_of(checkpoint, quantize), checkpoint.naming
    every = tuple(checkpoint.family.hf_names(model))
    reader = _present_names(checkpoint, {item.hf for item in every})
    present = set(reader.names())
    shapes = models.abstract_params(model)
    dense = tree.flatten(shapes)
    stored: dict[str, Stored] = {}
    tensors, fresh = [], []
    for item in every:
        replaceable = checkpoint.other_head and naming.of_head(item.hf)
        found = None
        if item.path[-1] == "kernel":
            found = formats.find_stored(reader, item.hf, present, settings)
        if found is None and item.hf not in present:
            if not replaceable:
                unexpected = present - {other.hf for other in every}
                raise _missing(checkpoint, item.hf, unexpected)
            fresh.append(item)
            continue
        expected = _file_shape(item, dense[item.path].shape)
        if found is None:
            shape = reader.info(item.hf).shape
        else:
            shape = tuple(found.matrix_shape[::-1] if item.transpose else found.matrix_shape)
        if shape != expected:
            if not replaceable:
                raise CheckpointError(
                    f"{reader.where(item.hf)}: tensor {item.hf!r} has the shape {list(shape)}, "
                    f"the config asks for {list(expected)}"
                )
            fresh.append(item)
            continue
        if found is not None:
            stored[item.hf] = found
        tensors.append(item)
    _check_extra(checkpoint, reader, {item.hf for item in every}, stored)
    leaves = dense if quantize is None else tree.flatten(quantize_params(shapes, quantize, skip))
    leaves = leaves | _stored_leaves(tuple(tensors), stored, dense)
    return Layout(reader, tuple(tensors), tuple(fresh), stored, leaves)


def _stored_leaves(
    tensors: tuple[HFName, ...], stored: Mapping[str, Stored], dense: Mapping[Path, Any]
) -> dict[Path, Any]:
    by_path: dict[Path, list[Stored | None]] = {}
    for item in tensors:
        by_path.setdefault(item.path, []).append(stored.get(item.hf))
    leaves: dict[Path, Any] = {}
    for path, items in by_path.items():
        first = items[0]
        kinds = {(s.spec, s.dtype) if s else None for s in items}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{'.'.join(path)}: its layers are not all quantized in the same way; "
                "load them apart, with scan=False"
            )
        if first is None:
            continue
        if first.remark:
            logger.info("%s: %s", ".".join(path), first.remark)
        lead = dense[path].shape[:-2]
        spec, dtype, shape = first.spec, np.dtype(first.dtype), first.matrix_shape
        leaves[path] = jax.eval_shape(lambda s=spec, d=dtype, m=shape, n=lead: empty(m, n, s, d))
    return leaves


def _file_shape(item: HFName, leaf: tuple[int, ...]) -> tuple[int, ...]:
    shape = leaf if item.index is None else leaf[1:]
    return shape[::-1] if item.transpose else shape


def _missing(checkpoint: Checkpoint, name: str, unexpected: set[str]) -> CheckpointError:
    near = tree.nearest(name, sorted(unexpected), 1)
    hint = f"; it has {near[0]!r} instead" if near else ""
    return CheckpointError(f"{checkpoint.source.path}: tensor {name!r} is missing{hint}")


def _present_names(checkpoint: Checkpoint, known: set[str]) -> Renamed:
    """The checkpoint under the names that files have today, each tied tensor once."""
    naming, reader = checkpoint.naming, checkpoint.reader
    roots = naming.roots(known)
    stored: dict[str, str] = {}
    for name in reader.names():
        present = name if name in known else naming.canonical(name, roots)
        if present in stored:
            raise CheckpointError(
                f"{reader.where(name)}: {name!r} and {stored[present]!r} are the same tensor"
            )
        stored[present] = name
    for copy, own in naming.ties:
        if copy in known or copy not in stored or own not in known:
            continue
        if own not in stored:
            stored[own] = stored.pop(copy)
        elif not checkpoint.other_head and _is_tied(reader, stored[copy], stored[own]):
            del stored[copy]
    return Renamed(reader, stored)


def _is_tied(reader: TensorReader, copy: str, own: str) -> bool:
    """Whether the file repeats a tensor, as the config promises."""
    if reader.info(copy) != reader.info(own):
        return False
    if reader.read(copy).tobytes() != reader.read(own).tobytes():
        raise CheckpointError(
            f"{reader.where(copy)}: {copy!r} differs from {own!r}, but config.json says "
            "tie_word_embeddings; set it to false to load both"
        )
    return True


def _check_extra(
    checkpoint: Checkpoint,
    reader: TensorReader,
    expected: set[str],
    stored: Mapping[str, Stored],
) -> None:
    naming = checkpoint.naming
    known = expected | {part for one in stored.values() for part in one.parts}
    names = reader.names()
    for name in names:
        unused = checkpoint.other_head and naming.of_head(name)
        # published masked-LM files keep the pooler that their head does not use
        unused |= naming.is_optional(name) or naming.is_ignored(name)
        unused |= name not in known and grouped.is_unused_bias(reader, name, set(names))
        if not (name in known or unused):
            raise CheckpointError(
                f"{reader.where(name)}: tensor {name!r} has no place in a "
                f"{checkpoint.family.name} model with this config"
            )
