"""A checkpoint quantized from files to files, one tensor in memory at a time."""

import fnmatch
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jqlora.errors import ConfigError
from jqlora.io.atomic import atomic_directory, atomic_write_json
from jqlora.io.checkpoint import Checkpoint, open_checkpoint
from jqlora.io.formats import quantization_config
from jqlora.io.layout import Layout, lay_out
from jqlora.io.place import Converter, convert, read_float
from jqlora.io.readers import TensorInfo, TensorReader
from jqlora.io.save import MAX_SHARD_BYTES, generation_config, quantized_group
from jqlora.io.shards import Group, write_weights
from jqlora.io.source import Source, resolve
from jqlora.io.tokenizer import load_tokenizer
from jqlora.models import HFName
from jqlora.quant import BlockQuant, QTensor
from jqlora.quant.params import SKIP
from jqlora.types import Progress

# Copied as they are; GGUF files have none of them, theirs are made from the metadata.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "*.jinja",
)


def quantize_checkpoint(
    source: str | Source,
    out: str | os.PathLike,
    spec: BlockQuant,
    *,
    dtype: DTypeLike | None = None,
    skip: tuple[str, ...] = SKIP,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write ``source``, quantized as ``spec`` says, to the directory ``out``.

    The result is what ``load(source, quantize=spec)`` followed by ``save_pretrained`` would write,
    without holding the model: bitsandbytes' 4-bit layout, which transformers + bitsandbytes load
    with the same packed bytes. Tokenizer and generation config come along.

    Raises what ``load`` and ``save_pretrained`` raise.
    """
    found = resolve(source)
    if Path(out).resolve() == found.folder.resolve():
        raise ConfigError(f"{out} is where the model is; write the quantized one elsewhere")
    checkpoint = open_checkpoint(found)
    name = checkpoint.dtype(dtype)
    model: Any = checkpoint.model(name)
    layout = lay_out(checkpoint, model, spec, skip)
    config = quantized_config(checkpoint, model, layout, name)
    with atomic_directory(out) as folder:
        write_companions(found, config, folder)  # first: they are quick to fail
        groups = quantized_groups(layout, name)
        write_weights(folder, groups, max_shard_bytes=max_shard_bytes, progress=progress)
        atomic_write_json(folder / "config.json", config)


def quantized_config(
    checkpoint: Checkpoint, model: Any, layout: Layout, dtype: str
) -> dict[str, Any]:
    """The config.json of ``checkpoint`` once it is stored as ``layout`` says.

    Raises ConfigError if nothing of it is quantized.
    """
    leaves = {item.hf: layout.leaves[item.path] for item in layout.tensors}
    specs = {hf: leaf.spec for hf, leaf in leaves.items() if isinstance(leaf, QTensor)}
    if not specs:
        raise ConfigError(f"skip leaves no matrix to quantize in {checkpoint.source.label}")
    quantization = quantization_config(specs, layout.tensors, dtype)
    return config_of(checkpoint, model, dtype) | {"quantization_config": quantization}


def quantized_groups(layout: Layout, dtype: str) -> list[Group]:
    """All tensors of ``layout``, to be read and quantized one by one as they are written."""
    return [_group(layout.reader, i, layout.leaves[i.path], dtype) for i in layout.tensors]


def _group(reader: TensorReader, item: HFName, leaf: Any, dtype: str) -> Group:
    if isinstance(leaf, QTensor):
        how = Converter(dtype, item.transpose, leaf.spec)
        return quantized_group(
            item.hf,
            leaf,
            lambda: convert(read_float(reader, item.hf), how),
        )
    info = TensorInfo(reader.info(item.hf).shape, np.dtype(jnp.dtype(dtype)))
    return Group({item.hf: info}, lambda: {item.hf: reader.read(item.hf).astype(info.dtype)})


def config_of(checkpoint: Checkpoint, model: Any, dtype: str) -> dict[str, Any]:
    """The source's own config where it has one: it may say more than a module needs."""
    if checkpoint.source.kind == "gguf":
        return model.config.to_hf("old")
    key = "dtype" if "dtype" in checkpoint.config else "torch_dtype"
    return {**checkpoint.config, key: dtype}


def head_config(checkpoint: Checkpoint, model: Any) -> dict[str, Any]:
    """What config.json says of the head that ``model`` has and the source has not."""
    content = model.config.to_hf("old")
    labels = {key: content[key] for key in ("id2label", "label2id") if key in content}
    return labels | {"architectures": [checkpoint.family.architecture(model.task)]}


def write_companions(source: Source, config: dict[str, Any], folder: Path) -> None:
    """Tokenizer and generation config: copied, or made from a GGUF file's metadata."""
    if source.kind == "gguf":
        load_tokenizer(source).save_pretrained(folder)
        atomic_write_json(folder / "generation_config.json", generation_config(config))
        return
    for file in sorted(source.folder.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, name) for name in COMPANIONS):
            shutil.copyfile(file, folder / file.name)
