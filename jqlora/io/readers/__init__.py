"""Readers of weight files, one file format each, all with the interface of ``TensorReader``."""

from pathlib import Path

from jqlora.errors import CheckpointError
from jqlora.io.readers.base import TensorInfo, TensorReader
from jqlora.io.readers.safetensors import SafetensorsFile
from jqlora.io.readers.sharded import ShardedReader
from jqlora.io.readers.torch_zip import TorchFile

__all__ = ["TensorInfo", "TensorReader", "open_directory"]


def open_directory(folder: Path) -> TensorReader:
    """A reader of the weights in a Hugging Face directory; safetensors are preferred to ``.bin``.

    Raises CheckpointError if there are none or their headers are damaged.
    """
    for stem, open_file in (
        ("model.safetensors", SafetensorsFile),
        ("pytorch_model.bin", TorchFile),
    ):
        if (folder / stem).exists():
            return open_file(folder / stem)
        if (folder / f"{stem}.index.json").exists():
            return ShardedReader(folder / f"{stem}.index.json", open_file)
    raise CheckpointError(
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index"
    )
