"""Tiny checkpoints made without torch, for tests of what reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqlora import models, tree
from jqlora.io.readers import TensorInfo
from jqlora.io.shards import Group, write_weights

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Q = "model.layers.1.self_attn.q_proj.weight"


def tensors_of(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random tensors under their names and in the orientation of a checkpoint."""
    family = models.family_of(config)
    task = models.task_of(config, None)
    model = family.build(family.parse(config), task=task, dtype=jnp.float32)
    shapes = tree.flatten(models.abstract_params(model))
    rng = np.random.default_rng(0)
    tensors = {}
    for item in family.hf_names(model):
        shape = shapes[item.path].shape[0 if item.index is None else 1 :]
        shape = shape[::-1] if item.transpose else shape
        tensors[item.hf] = (0.2 * rng.standard_normal(shape)).astype(dtype)
    return tensors


def write_tensors(
    folder: Path, tensors: dict[str, np.ndarray], max_shard_bytes: int = 10**9
) -> None:
    groups = [
        Group({name: TensorInfo(a.shape, a.dtype)}, lambda name=name, a=a: {name: a})
        for name, a in tensors.items()
    ]
    write_weights(folder, groups, max_shard_bytes=max_shard_bytes)


def write_checkpoint(
    folder: Path,
    change: Callable[[dict[str, Any], dict[str, np.ndarray]], None] | None = None,
    *,
    dtype: Any = np.float32,
    max_shard_bytes: int = 10**9,
    **overrides: Any,
) -> dict[str, np.ndarray]:
    """Write a checkpoint and return its tensors; ``change`` may spoil config and tensors before."""
    config = {**CONFIG, "torch_dtype": np.dtype(dtype).name, **overrides}
    tensors = tensors_of(config, dtype)
    if change is not None:
        change(config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def leaf_of(params: dict[str, Any], name: str) -> np.ndarray:
    """The tensor ``name`` of a checkpoint, taken out of stacked ``params``, in its orientation."""
    parts = name.removesuffix(".weight").removesuffix(".bias").split(".")
    index = next((int(part) for part in parts if part.isdigit()), None)
    node: Any = params
    for part in parts:
        node = node if part.isdigit() else node[part]
    kinds = ("bias",) if name.endswith(".bias") else ("kernel", "scale", "embedding")
    kind = next(kind for kind in kinds if kind in node)
    leaf = node[kind] if index is None else node[kind][index]
    return np.asarray(leaf).T if kind == "kernel" else np.asarray(leaf)
