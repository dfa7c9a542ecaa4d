"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Tensor names are ``base_model.model.<module>`` with ``.lora_A.weight`` [r, K] and
``.lora_B.weight`` [N, r], or ``.lora_embedding_A`` [r, V] and ``.lora_embedding_B`` [D, r]; for
AdaLoRA ``.lora_A`` [r, K], ``.lora_E`` [r, 1] and ``.lora_B`` [N, r], where r may be 0. Parameters
trained whole keep the names that they have in the model. Stacks are split into layers and cropped
to each layer's rank.

Where the input embedding is the output head as well, training it whole trains both; PEFT calls that
``ensure_weight_tying`` and writes the matrix under both names. Its default, an embedding that comes
apart from its head, is refused on reading: such a model is no longer tied.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from jqlora.attach import init, inspect_model, quantized_paths
from jqlora.errors import AdapterFileError, CheckpointError
from jqlora.graft import dense
from jqlora.io.atomic import atomic_directory, atomic_write_json
from jqlora.io.peft_config import CONFIG_FILE, PREFIX, write_config
from jqlora.io.peft_spec import read_config, read_spec
from jqlora.io.peft_ties import refuse_shared, tied_copies, tied_embedding
from jqlora.io.readers import TensorReader
from jqlora.io.readers.safetensors import SafetensorsFile
from jqlora.io.readers.torch_zip import TorchFile
from jqlora.methods import FULL, AdaLoRA, LoRA, Placement, Plan, assemble, method_of
from jqlora.methods.targeting import OUTPUT_HEAD
from jqlora.models import HFName, family_for
from jqlora.sites import Survey
from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, Params
from jqlora.types import Path as TreePath

WEIGHTS_FILE = "adapter_model.safetensors"
BASE_LAYER = ".base_layer"
REPLACES = (WEIGHTS_FILE, CONFIG_FILE, "adapter_model.bin", "README.md")


class Entry(NamedTuple):
    """One tensor of the file, and the part of an adapter leaf that it is.

    The leaf at ``path`` (collection first), at ``index`` of its lead axis, cropped to ``shape``
    and then transposed if ``transpose`` says so.
    """

    name: str
    path: TreePath
    index: int | None
    shape: tuple[int, ...]
    transpose: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return self.shape[::-1] if self.transpose else self.shape

    def place(self) -> tuple[Any, ...]:
        """Index of the part within the leaf."""
        lead = () if self.index is None else (self.index,)
        return (*lead, *(slice(size) for size in self.shape))


def save_adapter(
    path: str | os.PathLike,
    plan: Plan,
    adapters: Adapters,
    *,
    model: nn.Module,
    base_model_name: str | None = None,
) -> None:
    """Write a directory that ``PeftModel.from_pretrained`` reads; it replaces an earlier one whole.

    Tensors have the adapters' dtypes; bfloat16 is PEFT's with ``autocast_adapter_dtype=False``.
    Raises :class:`AdapterFileError` for a plan that PEFT cannot express.
    """
    names = _hf_names(model)
    refuse_shared(plan)
    flat = flatten(adapters)
    entries = _entries(plan, names)
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        part = np.asarray(flat[entry.path])[entry.place()]
        tensors[entry.name] = np.ascontiguousarray(part.T if entry.transpose else part)
    tied = tied_embedding(plan, model)
    if tied is not None:
        head = next(entry.name for entry in entries if entry.path == (FULL, *tied))
        tensors[f"{PREFIX}{OUTPUT_HEAD}.weight"] = tensors[head].copy()
    modules = [_module(name) for name in names.values()]
    config = write_config(
        plan,
        modules,
        task=_task(model),
        base_model_name=base_model_name,
        tie_saved=tied is not None,
        fan_in_fan_out=_stored_in_out(plan, names),
    )
    with atomic_directory(path, replaces=REPLACES) as folder:
        save_file(dict(sorted(tensors.items())), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        atomic_write_json(folder / CONFIG_FILE, config)


def load_adapter(
    path: str | os.PathLike, model: nn.Module, params: Params, *, dtype: DTypeLike = "float32"
) -> tuple[Plan, dict[str, Any]]:
    """``(plan, adapters)`` from a PEFT directory, LoRA or AdaLoRA, for ``model``; leaves are
    ``dtype``, to which PEFT's ``autocast_adapter_dtype`` takes them as well.

    ``params`` may be quantized; its values matter only where the file brings base weights of its
    own (PEFT writes them with adapted embeddings), which go to ``full`` if they differ. Raises
    :class:`AdapterFileError` naming the field, or the tensors that are missing, surplus or
    misshapen.
    """
    folder = Path(path)
    config = read_config(folder)
    reader = open_adapter(folder)
    names = _hf_names(model)
    survey = inspect_model(model, params)
    spec = _spec(config, survey, model, reader)
    plan = assemble((spec,), survey, quantized_paths(params))
    refuse_shared(plan)
    bases = {n: n.replace(BASE_LAYER, "") for n in reader.names() if f"{BASE_LAYER}." in n}
    entries = _entries(plan, names)
    given = set(reader.names()) - set(bases) - tied_copies(config, plan, model, reader)
    _check(entries, given, reader)
    sizes = _leaf_shapes(plan)
    flat = {entry.path: np.zeros(sizes[entry.path], np.float32) for entry in entries}
    for entry in entries:
        part = reader.read(entry.name).astype(np.float32)
        flat[entry.path][entry.place()] = part.T if entry.transpose else part
    if bases:
        plan = _take_base_weights(plan, flat, bases, reader, names, survey, params)
    return plan, unflatten({p: jnp.asarray(leaf, dtype) for p, leaf in flat.items()})


def _hf_names(model: nn.Module) -> dict[tuple[TreePath, int | None], HFName]:
    return {(name.path, name.index): name for name in family_for(model).hf_names(model)}


def _module(name: HFName) -> str:
    return name.hf.rsplit(".", 1)[0]


def _entries(plan: Plan, names: Mapping[tuple[TreePath, int | None], HFName]) -> list[Entry]:
    entries = []
    for placement in plan.placements:
        ranks = method_of(placement.spec).ranks(placement)
        for index, (served, rank) in enumerate(zip(placement.layers, ranks, strict=True)):
            if served:
                entries += _low_rank_entries(placement, index, rank, names)
    adapted = {placement.site.path for placement in plan.placements}
    for leaf in plan.full:
        # a parameter that is both trained whole and adapted is its adapter's base layer
        middle = f"{BASE_LAYER}." if leaf.path[:-1] in adapted else "."
        for index in range(leaf.lead[0]) if leaf.lead else (None,):
            hf = names[leaf.path, index]
            name = f"{PREFIX}{_module(hf)}{middle}{hf.hf.rsplit('.', 1)[1]}"
            shape = tuple(leaf.shape[len(leaf.lead) :])
            entries.append(Entry(name, (FULL, *leaf.path), index, shape, hf.transpose))
    return entries


def _low_rank_entries(
    placement: Placement,
    index: int,
    rank: int,
    names: Mapping[tuple[TreePath, int | None], HFName],
) -> list[Entry]:
    site = placement.site
    layer = index if site.lead else None
    module = PREFIX + _module(names[site.leaf_path, layer])
    path = (method_of(placement.spec).collection, *site.path)
    if isinstance(placement.spec, AdaLoRA):
        if site.kind != "dense":
            raise AdapterFileError(
                f"{placement.names[0]}: PEFT's AdaLoRA adapts no embedding; "
                "save what jq.as_lora makes of it"
            )
        return [
            Entry(f"{module}.lora_A", (*path, "p"), layer, (site.features_in, rank), True),
            Entry(f"{module}.lora_E", (*path, "lam"), layer, (1, rank), True),
            Entry(f"{module}.lora_B", (*path, "q"), layer, (rank, site.features_out), True),
        ]
    ends = ("lora_embedding_A", "lora_embedding_B")
    if site.kind == "dense":
        ends = ("lora_A.weight", "lora_B.weight")
    return [
        Entry(f"{module}.{ends[0]}", (*path, "a"), layer, (site.features_in, rank), True),
        Entry(f"{module}.{ends[1]}", (*path, "b"), layer, (rank, site.features_out), True),
    ]


def _stored_in_out(plan: Plan, names: Mapping[tuple[TreePath, int | None], HFName]) -> bool:
    """Whether the checkpoint keeps the weight of an adapted dense module (in, out)."""
    by_path = {name.path: name for name in names.values()}
    dense = [p.site.leaf_path for p in plan.placements if p.site.kind == "dense"]
    return any(not by_path[path].transpose for path in dense)


def _leaf_shapes(plan: Plan) -> dict[TreePath, tuple[int, ...]]:
    adapted = dataclasses.replace(plan, full=())
    leaves = flatten(jax.eval_shape(lambda: init(jax.random.key(0), adapted)))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    return shapes | {(FULL, *leaf.path): leaf.shape for leaf in plan.full}


def open_adapter(folder: Path) -> TensorReader:
    """The tensors of an adapter's directory; ``AdapterFileError`` if there are none to be read."""
    kinds = {WEIGHTS_FILE: SafetensorsFile, "adapter_model.bin": TorchFile}
    for file, kind in kinds.items():
        if (folder / file).exists():
            try:
                return kind(folder / file)
            except CheckpointError as error:
                raise AdapterFileError(str(error)) from error
    raise AdapterFileError(f"{folder} holds neither {' nor '.join(kinds)}")


def _spec(
    config: Mapping[str, Any], survey: Survey, model: nn.Module, reader: TensorReader
) -> LoRA | AdaLoRA:
    sites = [name for site in survey.sites for name in site.names]
    modules = {name for leaf in survey.leaves for name in leaf.names}
    parents = {".".join(n.split(".")[:i]) for n in modules for i in range(1, n.count(".") + 2)}
    saved = list(config.get("modules_to_save") or ())
    embedding = next((site.names[0] for site in survey.sites if site.attended), None)
    if embedding is not None:
        loose = [s for s in saved if embedding.endswith(s) or OUTPUT_HEAD.endswith(s)]
        if loose and not config.get("ensure_weight_tying"):
            raise AdapterFileError(
                f"modules_to_save={saved!r} with ensure_weight_tying=false gives the output head "
                "weights apart from the embedding, but this model ties them: untie the base first"
            )
        if loose:
            saved = [s for s in saved if s not in loose] + [embedding]
        elif config.get("ensure_weight_tying"):
            raise AdapterFileError(
                "ensure_weight_tying=true with an adapted embedding also adapts the tied output "
                "head, which is not supported; accepted: false"
            )
    return read_spec({**config, "modules_to_save": saved}, sites, sorted(parents))


def _task(model: Any) -> str:
    return model.task


def _check(entries: list[Entry], given: set[str], reader: TensorReader) -> None:
    expected = {entry.name: entry for entry in entries}
    where = reader.where(next(iter(reader.names()), ""))
    for what, names in (
        ("lacks", expected.keys() - given),
        ("has surplus", given - expected.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise AdapterFileError(f"{where} {what} {len(names)} tensors for this model: {shown}")
    for name, entry in expected.items():
        shape = reader.info(name).shape
        if tuple(shape) != entry.stored_shape:
            raise AdapterFileError(
                f"{where}: {name} has shape {tuple(shape)}, expected {entry.stored_shape}"
            )


def _take_base_weights(
    plan: Plan,
    flat: dict[TreePath, np.ndarray],
    bases: Mapping[str, str],
    reader: TensorReader,
    names: Mapping[tuple[TreePath, int | None], HFName],
    survey: Survey,
    params: Params,
) -> Plan:
    """Put base weights that the file brings, and that are not the model's own, into ``full``."""
    by_hf = {name.hf: name for name in names.values()}
    leaves = {leaf.path: leaf for leaf in survey.leaves}
    base = flatten(params)
    added: dict[TreePath, Any] = {}
    for stored, plain in bases.items():
        hf = by_hf.get(plain.removeprefix(PREFIX))
        if hf is None:
            raise AdapterFileError(f"{reader.where(stored)}: {stored} is no weight of this model")
        leaf, path = base[hf.path], (FULL, *hf.path)
        value = reader.read(stored)
        value = value.T if hf.transpose else value
        place = () if hf.index is None else (hf.index,)
        if path not in flat:
            if isinstance(leaf, jax.Array) and np.array_equal(
                leaf[place], value.astype(leaf.dtype)
            ):
                continue
            flat[path] = _values(leaf, reader.where(stored), stored)
            added[hf.path] = leaves[hf.path]
        flat[path][place] = value.astype(np.float32)
    return dataclasses.replace(plan, full=(*plan.full, *added.values()))


def _values(leaf: Any, where: str, name: str) -> np.ndarray:
    """What a leaf holds, fp32, as a copy; zeros for an abstract one that is overwritten whole."""
    if all(isinstance(part, jax.Array) for part in jax.tree.leaves(leaf)):
        return np.array(dense(leaf), np.float32)
    if leaf.ndim > 2:
        raise AdapterFileError(f"{where}: {name} is one layer of a stack whose others are unknown")
    return np.zeros(leaf.shape, np.float32)
