"""Models written as Hugging Face directories that transformers (and bitsandbytes) load.

Dense leaves are written as they are; ``QTensor`` leaves in the format of their storage (that of
bitsandbytes, or the one they were loaded from) with their exact bytes. A save happens wholly or not
at all (``jqlora.io.atomic``).
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import linen as nn

from jqlora import models, tree
from jqlora.errors import CheckpointError
from jqlora.io.atomic import atomic_directory, atomic_write_json
from jqlora.io.checkpoint import DECODING
from jqlora.io.formats import format_of, quantization_config
from jqlora.io.readers import TensorInfo
from jqlora.io.shards import Group, write_weights
from jqlora.models import HFName, family_for
from jqlora.models.tasks import GENERATING
from jqlora.quant import QTensor
from jqlora.types import Params, Path, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHARD_BYTES = 5_000_000_000


def save_pretrained(
    path: str | os.PathLike,
    model: nn.Module,
    params: Params,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write ``model`` with ``params`` to the directory ``path`` in Hugging Face's layout.

    Safetensors (sharded with an index above ``max_shard_bytes``), config.json, generation config,
    and the tokenizer's files if one is given. Leaves keep their dtype; ``QTensor`` leaves become
    tensors of their format with a ``quantization_config``. A model that was loaded and saved has
    bit-identical tensors.

    Raises CheckpointError if ``params`` are not those of ``model``, and SaveError if ``path``
    cannot be written; an earlier ``path`` then is as it was.
    """
    family, task = family_for(model), _task(model)
    names = family.hf_names(model)
    leaves = tree.flatten(params)
    _check_leaves(leaves, tree.flatten(models.abstract_params(model)))
    config = dataclasses.replace(_config(model), dtype=_main_dtype(leaves.values()))
    content = config.to_hf("old") | {"architectures": [family.architecture(task)]}
    quantized = {item.hf: leaves[item.path] for item in names if _is_quantized(leaves[item.path])}
    if quantized:
        specs = {name: q.spec for name, q in quantized.items()}
        content["quantization_config"] = quantization_config(specs, names, config.dtype)
    with atomic_directory(path) as folder:
        groups = [_group(item, leaves[item.path]) for item in names]
        write_weights(folder, groups, max_shard_bytes=max_shard_bytes, progress=progress)
        atomic_write_json(folder / "config.json", content)
        if task in GENERATING:
            atomic_write_json(folder / "generation_config.json", generation_config(content))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that generation reads."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", *DECODING)
    return {"_from_model_config": True} | {key: config[key] for key in keys if key in config}


def quantized_group(name: str, like: QTensor, load: Callable[[], QTensor]) -> Group:
    """The file's tensors for one quantized weight; ``load()`` gives its ``QTensor``, ``like`` has
    its spec and shape, and may be abstract or a stack of such."""
    form = format_of(like.spec)
    return Group(
        infos=form.infos(name, like.spec, like.matrix_shape),
        load=lambda: form.encode(name, jax.device_get(load())),
        texts=form.texts(name, like.spec),
    )


def _group(item: HFName, leaf: Any) -> Group:
    def part() -> Any:
        if item.index is None:
            return leaf
        index = np.int32(item.index)  # an array, so that one compiled slice serves all layers
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), leaf)

    if isinstance(leaf, QTensor):
        return quantized_group(item.hf, leaf, part)
    shape = leaf.shape if item.index is None else leaf.shape[1:]

    def load() -> dict[str, np.ndarray]:
        array = np.asarray(part())
        return {item.hf: array.T if item.transpose else array}

    info = TensorInfo(tuple(shape[::-1] if item.transpose else shape), np.dtype(leaf.dtype))
    return Group({item.hf: info}, load)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def _config(model: nn.Module) -> Any:
    return model.config  # pyright: ignore[reportAttributeAccessIssue]  every family's module has one


def _task(model: nn.Module) -> str:
    return model.task  # pyright: ignore[reportAttributeAccessIssue]


def _main_dtype(leaves: Iterable[Any]) -> str:
    """The dtype of most parameters that are not quantized."""
    sizes: collections.Counter[str] = collections.Counter()
    for leaf in leaves:
        if not _is_quantized(leaf):
            sizes[np.dtype(leaf.dtype).name] += leaf.size
    return sizes.most_common(1)[0][0]


def _check_leaves(leaves: Mapping[Path, Any], expected: Mapping[Path, Any]) -> None:
    for path in {**expected, **leaves}:
        if path not in leaves or path not in expected:
            what = "lack the leaf" if path in expected else "have a leaf that the model has not:"
            raise CheckpointError(f"the params {what} {'.'.join(path)}")
        if tuple(leaves[path].shape) != expected[path].shape:
            raise CheckpointError(
                f"the params' leaf {'.'.join(path)} has the shape {tuple(leaves[path].shape)}, "
                f"the model's config asks for {expected[path].shape}"
            )
