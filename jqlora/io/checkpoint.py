"""A checkpoint opened: its config, its architecture, its tensors by name; nothing loaded yet."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jqlora.errors import CheckpointError, ConfigError
from jqlora.io.gguf_config import config_from_gguf
from jqlora.io.readers import TensorReader, open_directory
from jqlora.io.readers.gguf import GGUFTensors, open_gguf
from jqlora.io.source import Source
from jqlora.models import Family, family_of, task_of
from jqlora.models.tasks import LABELLED

DTYPES = ("float32", "bfloat16", "float16")


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
            reader = GGUFTensors(source.path, header)
        except CheckpointError as error:
            raise CheckpointError(f"{source.path}: {error}") from error
        return _assemble(source, source.path, config, lambda: reader, task, num_labels)
    path = source.path / "config.json"
    # the config first: an unknown architecture explains more than what its weights may lack
    config = read_config(path)
    return _assemble(source, path, config, lambda: open_directory(source.path), task, num_labels)


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
) -> Checkpoint:
    try:
        family = family_of(config)
        task = task_of(config, asked)
        parsed = family.parse(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    other_head = task != family.task(config)
    if num_labels is not None:
        if task not in LABELLED:
            raise ConfigError(f"num_labels={num_labels} has no meaning for the task {task!r}")
        other_head |= parsed.num_labels != num_labels
        parsed = parsed.with_labels(num_labels)
    return Checkpoint(source, config, family, parsed, open_reader(), task, other_head)
