"""The formats of quantized checkpoints, and which of them a model is written in."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from jqlora.errors import CheckpointError, ConfigError
from jqlora.io import bnb, bnb_int8, grouped
from jqlora.io.checkpoint import Checkpoint
from jqlora.io.readers import TensorReader
from jqlora.io.stored import Format, Settings, Stored
from jqlora.models import HFName
from jqlora.quant import FP4, NF4, BlockQuant, GroupInt, RowInt8, Storage

FORMATS: dict[type[Storage], Format] = {
    NF4: bnb.FORMAT,
    FP4: bnb.FORMAT,
    RowInt8: bnb_int8.FORMAT,
    GroupInt: grouped.FORMAT,
}
READ = "bitsandbytes 4-bit (nf4, fp4) and 8-bit, GPTQ and AWQ can be loaded"


def settings_of(checkpoint: Checkpoint, quantize: BlockQuant | None) -> Settings:
    """What the checkpoint says of its quantization.

    Raises CheckpointError naming a method that is not read, and ConfigError for ``quantize`` on top
    of another quantization.
    """
    config = checkpoint.config.get("quantization_config") or {}
    label = checkpoint.source.label
    settings = Settings(config, checkpoint.dtype())
    if not config:
        return settings
    method = config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config else None)
    if method in grouped.FORMATS:
        try:
            grouped.spec_of(config)
        except CheckpointError as error:
            raise CheckpointError(f"{label} {error}") from error
    elif method != "bitsandbytes":
        raise CheckpointError(f"{label} is quantized by {method!r}; {READ}")
    if quantize is not None:
        kind = config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else None
        raise ConfigError(
            f"{label} is already quantized ({kind or method}): load it without quantize={quantize}"
        )
    return settings


def find_stored(
    reader: TensorReader, name: str, present: Set[str], settings: Settings
) -> Stored | None:
    """How the weight ``name`` is quantized, or None if it is a plain tensor; reads no codes.

    ``present`` are the reader's names.
    """
    for form in dict.fromkeys(FORMATS.values()):
        stored = form.find(reader, name, present, settings)
        if stored is not None:
            return stored
    return None


def format_of(spec: Storage) -> Format:
    """The format that holds weights of ``spec``.

    Raises CheckpointError for a storage that files have no place for.
    """
    found = FORMATS.get(type(spec))
    if found is None:
        raise CheckpointError(
            f"{spec.scheme} weights are kept in memory alone: files hold nf4 or fp4, the codes "
            "that came out of files, or dense weights (quantize after loading them)"
        )
    return found


def quantization_config(
    specs: Mapping[str, Storage], names: Iterable[HFName], compute_dtype: str
) -> dict[str, Any]:
    """What transformers needs to know of the quantized weights ``specs``, by name.

    Raises CheckpointError if they are of several kinds, which one config cannot say, or of one that
    files have no place for.
    """
    found = {format_of(spec): spec.scheme for spec in specs.values()}
    if len(found) > 1:
        kinds = sorted(found.values())
        raise CheckpointError(f"weights of several kinds, {kinds}, cannot share a config")
    kept = [
        item.hf.removesuffix(".weight")
        for item in names
        if item.path[-1] == "kernel" and item.hf not in specs
    ]
    (form,) = found
    return form.config(set(specs.values()), tuple(specs), kept, compute_dtype)
