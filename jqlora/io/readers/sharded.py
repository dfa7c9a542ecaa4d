"""Weights spread over several files, listed by a ``*.index.json``."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jqlora.errors import CheckpointError
from jqlora.io.readers.base import TensorInfo, TensorReader


class ShardedReader:
    """Reader of all files that an index names; index and files must agree tensor by tensor."""

    def __init__(self, index: Path, open_file: Callable[[Path], TensorReader]):
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        except OSError as error:
            raise CheckpointError(f"cannot read {index}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a weight index: {error!r}") from error
        self._readers: dict[str, TensorReader] = {}
        for file in files:
            # only names beside the index: an index must not reach out of its directory
            if Path(file).name != file or not (index.parent / file).exists():
                raise CheckpointError(f"{index} names the shard {file!r}, which is absent")
            shard = open_file(index.parent / file)
            for name in shard.names():
                if weight_map.get(name) != file:
                    raise CheckpointError(
                        f"{index.parent / file} holds tensor {name!r}, which {index.name} "
                        f"{'does not list' if name not in weight_map else 'puts elsewhere'}"
                    )
                self._readers[name] = shard
        for name, file in weight_map.items():
            if name not in self._readers:
                raise CheckpointError(
                    f"{index} puts tensor {name!r} in {file!r}, which does not hold it"
                )

    def names(self) -> list[str]:
        return list(self._readers)

    def info(self, name: str) -> TensorInfo:
        return self._readers[name].info(name)

    def where(self, name: str) -> str:
        return self._readers[name].where(name)

    def read(self, name: str) -> np.ndarray:
        return self._readers[name].read(name)
