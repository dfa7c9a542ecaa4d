"""Which architectures can be loaded, and where each tensor of their checkpoints belongs.

A new architecture is a row here and, if its mathematics is new, one file with its module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.errors import CheckpointError
from jqlora.models.config import LlamaConfig
from jqlora.models.hf_keys import KINDS
from jqlora.models.llama import LlamaForCausalLM
from jqlora.tree import flatten
from jqlora.types import Path


@dataclass(frozen=True, kw_only=True)
class HFName:
    """One tensor of a checkpoint, and the leaf it is or the layer of the leaf it fills.

    ``index`` is the position on the leaf's lead axis, None where the leaf has none. A transposed
    tensor is stored (out, in) where the leaf is (in, out).
    """

    hf: str
    path: Path
    index: int | None = None
    transpose: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: how its config is read, its module built and its tensors named."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Any]
    build: Callable[..., nn.Module]
    hf_names: Callable[[Any], list[HFName]]
    module: type[nn.Module]


def abstract_params(model: Any) -> dict[str, Any]:
    """Shapes and dtypes of the model's parameters, nothing allocated."""
    variables = jax.eval_shape(
        lambda inputs: model.init(jax.random.key(0), **inputs), model.example_inputs()
    )
    return variables["params"]


def _build_llama(config: LlamaConfig, dtype: Any = jnp.float32, **options: Any) -> nn.Module:
    return LlamaForCausalLM(config, **{"dtype": dtype, "param_dtype": dtype, **options})


# Linen's name of a leaf -> Hugging Face's, and whether it is stored transposed.
_LEAVES = {
    "kernel": ("weight", True),
    "bias": ("bias", False),
    "scale": ("weight", False),
    "embedding": ("weight", False),
}


def _llama_names(model: LlamaForCausalLM) -> list[HFName]:
    """Every tensor of the model's checkpoint, layer by layer so that a file is read in order."""
    depth = model.config.num_hidden_layers
    outside: list[HFName] = []
    layers: list[list[HFName]] = [[] for _ in range(depth)]
    for path in flatten(abstract_params(model)):
        leaf, transpose = _LEAVES[path[-1]]
        if path[1].startswith("layers"):
            numbers = range(depth) if model.scan else [int(path[1].removeprefix("layers_"))]
            for i in numbers:
                hf = ".".join(("model.layers", str(i), *path[2:-1], leaf))
                index = i if model.scan else None
                layers[i].append(HFName(hf=hf, path=path, index=index, transpose=transpose))
        else:
            hf = ".".join((*path[:-1], leaf))
            outside.append(HFName(hf=hf, path=path, transpose=transpose))
    return [*outside, *(name for layer in layers for name in layer)]


def _llama_family(name: str) -> Family:
    return Family(
        name=name,
        model_types=(name,),
        architectures=(KINDS[name].architecture,),
        parse=LlamaConfig.from_hf,
        build=_build_llama,
        hf_names=_llama_names,
        module=LlamaForCausalLM,
    )


FAMILIES: tuple[Family, ...] = tuple(_llama_family(name) for name in KINDS)


def _known() -> str:
    return ", ".join(f"{f.model_types[0]} ({', '.join(f.architectures)})" for f in FAMILIES)


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to.

    Raises CheckpointError listing the known ones if none does, or if the checkpoint is of another
    architecture on the same base (a classifier, say).
    """
    model_type, architectures = hf_config.get("model_type"), hf_config.get("architectures") or ()
    for family in FAMILIES:
        if model_type in family.model_types or (
            model_type is None and set(architectures) & set(family.architectures)
        ):
            if architectures and not set(architectures) & set(family.architectures):
                break
            return family
    raise CheckpointError(
        f"config.json: model_type={model_type!r} with architectures={list(architectures)} "
        f"is not supported; known: {_known()}"
    )


def family_for(model: nn.Module) -> Family:
    """The family of a module that :func:`family_of` built; TypeError for any other module."""
    for family in FAMILIES:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if isinstance(model, family.module) and kind in family.model_types:
            return family
    raise TypeError(f"{type(model).__name__} belongs to no known family; known: {_known()}")
