"""Which tensor of a checkpoint becomes which leaf: everything checked before anything is read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jqlora import models, tree
from jqlora.errors import CheckpointError, ConfigError
from jqlora.io import bnb
from jqlora.io.checkpoint import Checkpoint
from jqlora.models import HFName
from jqlora.quant import BlockQuant, empty, quantize_params
from jqlora.quant.params import SKIP
from jqlora.types import Path

logger = logging.getLogger(__name__)
# A buffer that files of older transformers carry; its content follows from the config.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Layout:
    """``tensors`` in reading order; ``stored`` has those that the file holds quantized.

    ``leaves`` are the shapes of the result: ``ShapeDtypeStruct``, or ``QTensor`` of them.
    """

    tensors: tuple[HFName, ...]
    stored: Mapping[str, bnb.StoredQuant]
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

    Raises CheckpointError naming file and tensor if one is missing, extra or misshapen, and
    ConfigError for ``quantize`` of a checkpoint that is quantized already.
    """
    check_quantization_config(checkpoint, quantize)
    reader, present = checkpoint.reader, set(checkpoint.reader.names())
    tensors = tuple(checkpoint.family.hf_names(model))
    dense = tree.flatten(models.abstract_params(model))
    stored: dict[str, bnb.StoredQuant] = {}
    for item in tensors:
        if item.hf not in present:
            unexpected = present - {other.hf for other in tensors}
            raise _missing(checkpoint, item.hf, unexpected)
        found = bnb.find_stored(reader, item.hf, present) if item.path[-1] == "kernel" else None
        if found is not None:
            stored[item.hf] = found
        shape = reader.info(item.hf).shape if found is None else tuple(found.matrix_shape[::-1])
        _check_shape(checkpoint, item, shape, dense[item.path].shape)
    _check_extra(checkpoint, {item.hf for item in tensors}, stored)
    leaves = tree.flatten(abstract_params(model, quantize, skip=skip))
    return Layout(tensors, stored, {**leaves, **_stored_leaves(tensors, stored, dense)})


def check_quantization_config(checkpoint: Checkpoint, quantize: BlockQuant | None) -> None:
    """Accept bitsandbytes' 4-bit and nothing else; never on top of another quantization."""
    config = checkpoint.config.get("quantization_config")
    if not config:
        return
    method = config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config else None)
    label = checkpoint.source.label
    if method != "bitsandbytes" or config.get("load_in_8bit"):
        what = "bitsandbytes 8-bit" if method == "bitsandbytes" else repr(method)
        raise CheckpointError(
            f"{label} is quantized by {what}; bitsandbytes 4-bit (nf4, fp4) can be loaded"
        )
    if quantize is not None:
        raise ConfigError(
            f"{label} is already quantized ({config.get('bnb_4bit_quant_type', '4-bit')}): "
            f"load it without quantize={quantize}"
        )


def _stored_leaves(
    tensors: tuple[HFName, ...], stored: Mapping[str, bnb.StoredQuant], dense: Mapping[Path, Any]
) -> dict[Path, Any]:
    by_path: dict[Path, list[bnb.StoredQuant | None]] = {}
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
        if first.nested and not first.spec.double_quant:
            logger.info("%s: second-level scales of another code, kept as fp32", ".".join(path))
        lead = dense[path].shape[:-2]
        spec, dtype, shape = first.spec, np.dtype(first.dtype), first.matrix_shape
        leaves[path] = jax.eval_shape(lambda s=spec, d=dtype, m=shape, n=lead: empty(m, n, s, d))
    return leaves


def _check_shape(
    checkpoint: Checkpoint, item: HFName, found: tuple[int, ...], leaf: tuple[int, ...]
) -> None:
    expected = leaf if item.index is None else leaf[1:]
    expected = expected[::-1] if item.transpose else expected
    if found != expected:
        raise CheckpointError(
            f"{checkpoint.reader.where(item.hf)}: tensor {item.hf!r} has the shape {list(found)}, "
            f"the config asks for {list(expected)}"
        )


def _missing(checkpoint: Checkpoint, name: str, unexpected: set[str]) -> CheckpointError:
    near = tree.nearest(name, sorted(unexpected), 1)
    hint = f"; it has {near[0]!r} instead" if near else ""
    return CheckpointError(f"{checkpoint.source.path}: tensor {name!r} is missing{hint}")


def _check_extra(
    checkpoint: Checkpoint, expected: set[str], stored: Mapping[str, bnb.StoredQuant]
) -> None:
    known = expected | {part for name in stored for part in bnb.part_names(name)}
    for name in checkpoint.reader.names():
        if name in known or name.endswith(_COMPUTED):
            continue
        if name == "lm_head.weight" and _is_tied(checkpoint):
            continue
        raise CheckpointError(
            f"{checkpoint.reader.where(name)}: tensor {name!r} has no place in a "
            f"{checkpoint.family.name} model with this config"
        )


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the file repeats the embedding as output head, as the config promises."""
    reader = checkpoint.reader
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if reader.info(head) != reader.info(embedding):
        return False
    if reader.read(head).tobytes() != reader.read(embedding).tobytes():
        raise CheckpointError(
            f"{reader.where(head)}: {head!r} differs from {embedding!r}, but config.json says "
            "tie_word_embeddings; set it to false to load both"
        )
    return True
