"""A checkpoint opened: its config, its architecture, its tensors by name; nothing loaded yet."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jqlora.errors import CheckpointError, ConfigError
from jqlora.io.gguf_config import config_from_gguf
from jqlora.io.readers import TensorReader, open_directory
from jqlora.io.readers.gguf import GGUFTensors
from jqlora.io.readers.gguf_header import open_gguf
from jqlora.io.source import Source
from jqlora.models import Family, Naming, family_of, task_of
from jqlora.models.tasks import LABELLED

DTYPES = ("float32", "bfloat16", "float16")
DECODING = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""What both configs may say of how an encoder-decoder writes."""


@dataclass(frozen=True)
class Checkpoint:
    """``config`` is the content of config.json, whatever the files' format.

    ``task`` is what the model is to be built for; ``other_head`` says that the files were made for
    something else, so that they lack its head and may have their own.
    """

    source: Source
    config: dict[str, Any]
    family: Family
    parsed: Any
    reader: TensorReader
    task: str
    other_head: bool

    @property
    def naming(self) -> Naming:
        """How the tensors of the model's class are called."""
        return self.family.naming_for(self.task)

    def dtype(self, asked: Any = None) -> str:
        """The name of the dtype to load: the one asked for, else the checkpoint's own.

        The checkpoint's own is what its config says, or else how its first matrix is stored.
        Raises ConfigError for a dtype that models are not computed in.
        """
        if asked is not None:
            try:
                name = jnp.dtype(asked).name
            except TypeError:
                name = str(asked)
            if name not in DTYPES:
                raise ConfigError(f"dtype={name!r} is not one of {', '.join(DTYPES)}")
            return name
        if self.parsed.dtype is not None:
            return self.parsed.dtype
        stored = (self.reader.info(name) for name in self.reader.names())
        matrices = [i.dtype.name for i in stored if len(i.shape) > 1 and i.dtype.name in DTYPES]
        return matrices[0] if matrices else "float32"

    def model(self, dtype: str, *, scan: bool = True) -> nn.Module:
        """The Linen module, with parameters and computation in ``dtype``."""
        config = dataclasses.replace(self.parsed, dtype=dtype)
        return self.family.build(config, task=self.task, dtype=jnp.dtype(dtype), scan=scan)


def open_checkpoint(
    source: Source, *, task: str | None = None, num_labels: int | None = None
) -> Checkpoint:
    """Read the config and the headers of all weight files.

    ``task`` and ``num_labels`` ask for another head than the config's. Raises CheckpointError for a
    missing or broken config, an unknown architecture or a head that it has not, and damaged or
    truncated files; ConfigError for ``num_labels`` of a head without labels.
    """
    if source.kind == "gguf":
        header = open_gguf(source.path)
        try:
            config = config_from_gguf(header)
            reader = GGUFTensors(header)
        except CheckpointError as error:
            raise CheckpointError(f"{source.path}: {error}") from error
        return _assemble(source, source.path, config, lambda: reader, task, num_labels)
    path = source.path / "config.json"
    # the config first: an unknown architecture explains more than what its weights may lack
    config = read_config(path)
    beside = source.path / "quantize_config.json"
    if "quantization_config" not in config and beside.exists():
        # where AutoGPTQ first wrote it
        config["quantization_config"] = {"quant_method": "gptq", **read_config(beside)}
    decoding = _read_decoding(source.path / "generation_config.json")
    return _assemble(
        source, path, config, lambda: open_directory(source.path), task, num_labels, decoding
    )


def family_at(source: Source) -> Family:
    """The family of a checkpoint, by its config alone. Raises CheckpointError as
    :func:`open_checkpoint` does for a config."""
    if source.kind == "gguf":
        return family_of(config_from_gguf(open_gguf(source.path)))
    return family_of(read_config(source.path / "config.json"))


def _read_decoding(path: Path) -> dict[str, Any]:
    """What generation_config.json says instead of config.json, as in transformers: nothing if there
    is none, else what forces tokens, by its silence too, and where to start if it says so."""
    if not path.exists():
        return {}
    said = read_config(path)
    return {key: said.get(key) for key in DECODING if key in said or key.startswith("forced")}


def read_config(path: Path) -> dict[str, Any]:
    """A parsed ``config.json``. Raises CheckpointError if it is absent or no JSON object."""
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def _assemble(
    source: Source,
    path: Path,
    config: dict[str, Any],
    open_reader: Callable[[], TensorReader],
    asked: str | None,
    num_labels: int | None,
    decoding: Mapping[str, Any] | None = None,
) -> Checkpoint:
    try:
        family = family_of(config)
        task = task_of(config, asked)
        parsed = family.parse({**config, **(decoding or {})})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    other_head = task != family.task(config)
    if num_labels is not None:
        if task not in LABELLED:
            raise ConfigError(f"num_labels={num_labels} has no meaning for the task {task!r}")
        other_head |= parsed.num_labels != num_labels
        parsed = parsed.with_labels(num_labels)
    reader = open_reader()
    naming = family.naming_for(task)
    if naming.loose_head is not None:
        tied = not _has_own_head(naming, reader)
        parsed = dataclasses.replace(parsed, tie_word_embeddings=tied)
    return Checkpoint(source, config, family, parsed, reader, task, other_head)


def _has_own_head(naming: Naming, reader: TensorReader) -> bool:
    """Whether the file has a head beside an embedding that differs from it.

    transformers 5 writes of every T5 that its head is tied, and goes by the file itself.
    """
    names, head = set(reader.names()), naming.loose_head
    copies = (name for tie in naming.ties for name in tie[::-1] if name != head)
    embedding = next((name for name in copies if name in names), None)
    if head not in names or embedding is None:
        return False
    if reader.info(head) != reader.info(embedding):
        return True
    return reader.read(head).tobytes() != reader.read(embedding).tobytes()
