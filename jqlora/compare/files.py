"""Files both ways: what is bit for bit the same after it was read and written again."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from safetensors.numpy import load_file

from jqlora.compare.measure import Measurement, same_files
from jqlora.compare.our_side import by_file_names
from jqlora.io import load
from jqlora.io.checkpoint import open_checkpoint
from jqlora.io.layout import lay_out
from jqlora.io.peft import WEIGHTS_FILE, load_adapter
from jqlora.io.readers import open_directory
from jqlora.io.save import save_pretrained
from jqlora.io.source import Source
from jqlora.methods import Plan, method_of
from jqlora.quant.params import SKIP
from jqlora.types import Params


def round_trip(source: Source, scratch: Path) -> Measurement:
    """Every tensor of the checkpoint against its copy, loaded in its own dtype and saved again
    under ``scratch``; old names count as those of today, and tied tensors once."""
    checkpoint = open_checkpoint(source)
    layout = lay_out(checkpoint, checkpoint.model(checkpoint.dtype()), None, SKIP)
    save_pretrained(scratch / "again", *load(source))
    before, after = layout.reader, open_directory(scratch / "again")
    present = set(after.names())
    heads = {item.hf for item in layout.tensors}
    names = [n for n in before.names() if n in heads or n.rsplit(".", 1)[0] in heads]
    found = [
        same_files("", {n: after.read(n)} if n in present else {}, {n: before.read(n)})
        for n in names
    ]
    return dataclasses.replace(
        same_files(f"round trip of {len(names)} tensors", {}, {}),
        largest=max(one.largest for one in found),
        relative=max(one.relative for one in found),
        error=sum(one.error for one in found),
    )


def adapter_in(
    folder: Path, model: nn.Module, params: Params, plan: Plan, dtype: str
) -> Measurement:
    """An adapter that PEFT wrote, read here and named again; it must serve the modules of ``plan``
    with its ranks and scales, too. ``params`` may be abstract."""
    from_file, adapters = load_adapter(folder, model, params)
    tensors = load_file(folder / WEIGHTS_FILE)
    theirs = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
    ours = by_file_names(from_file, adapters, model)
    found = same_files("adapter from PEFT", ours, theirs, dtype)
    different = _served(from_file) != _served(plan)
    return dataclasses.replace(found, error=found.error + different)


def _served(plan: Plan) -> dict[Any, Any]:
    made = {}
    for placement in plan.placements:
        method = method_of(placement.spec)
        constants = {n: np.asarray(c).tolist() for n, c in method.constants(placement).items()}
        made[placement.site.path, placement.names] = (method.ranks(placement), constants)
    return made
