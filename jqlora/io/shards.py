"""Weights written as safetensors, one group of tensors at a time.

Shapes are known before bytes, so a file's layout is fixed first and every tensor is then written to
its place as it comes: nothing is held back in memory. Tensors of wider types come first, which
keeps each aligned to its own item size, as torch needs to map a file.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jqlora.io.atomic import atomic_write_json
from jqlora.io.readers import TensorInfo
from jqlora.io.readers.safetensors import DTYPES

INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_TEXT = 256  # bytes of JSON that a quantization state takes at most


@dataclass(frozen=True)
class Group:
    """Tensors that come into being together and are kept in one file.

    ``infos`` fixes the shapes; ``texts`` names uint8 tensors whose length is known only when
    ``load`` has run. ``load`` returns all of them on the host.
    """

    infos: Mapping[str, TensorInfo]
    load: Callable[[], Mapping[str, np.ndarray]]
    texts: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        """What the group takes in a file; an upper bound where there are texts."""
        return sum(map(_nbytes, self.infos.values())) + _LONGEST_TEXT * len(self.texts)


class SafetensorsWriter:
    """One file of known layout, written in any order; complete when its ``with`` block ends well.

    ``texts`` are placed at the end, when their lengths are known; the header is written last, into
    space that was kept for it and is padded with blanks, as the format allows.
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], texts: Sequence[str] = ()):
        self.end = 0
        self._entries: dict[str, dict] = {}
        self._texts: dict[str, np.ndarray] = {}
        for name in sorted(infos, key=lambda n: (-infos[n].dtype.itemsize, n)):
            self._append(name, infos[name])
        reserved = {text: _entry(_text_info(_LONGEST_TEXT), 10**15) for text in texts}
        length = len(_header({**self._entries, **reserved}))
        self._start = 8 + -(-length // 8) * 8
        self._file = open(path, "wb")  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is not None:
                return
            for name, text in self._texts.items():
                self._append(name, _text_info(text.size))
                self._put(name, text)
            header = _header(self._entries).ljust(self._start - 8)
            self._file.truncate(self._start + self.end)
            self._file.seek(0)
            self._file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, array: np.ndarray) -> None:
        """Put one tensor into its place. Raises ValueError if it is not what was announced."""
        if name in self._entries:
            self._put(name, array)
        else:
            self._texts[name] = array

    def _append(self, name: str, info: TensorInfo) -> None:
        self._entries[name] = _entry(info, self.end)
        self.end += _nbytes(info)

    def _put(self, name: str, array: np.ndarray) -> None:
        entry = self._entries[name]
        if [_NAMES[array.dtype], list(array.shape)] != [entry["dtype"], entry["shape"]]:
            raise ValueError(f"{name}: {array.dtype} {array.shape} is not the announced {entry}")
        self._file.seek(self._start + entry["data_offsets"][0])
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_weights(
    folder: Path,
    groups: Sequence[Group],
    *,
    max_shard_bytes: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Write all groups as ``model.safetensors``, or as shards with an index if they are large.

    A shard holds at most ``max_shard_bytes``, or one group that alone is larger.
    """
    shards = _spread(groups, max_shard_bytes)
    weight_map: dict[str, str] = {}
    done = total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else name
        infos = {n: info for group in shard for n, info in group.infos.items()}
        texts = [text for group in shard for text in group.texts]
        weight_map |= dict.fromkeys((*infos, *texts), file)
        with SafetensorsWriter(folder / file, infos, texts) as writer:
            for group in shard:
                for key, array in group.load().items():
                    writer.write(key, array)
                done += 1
                if progress is not None:
                    progress(done, len(groups), next(iter(group.infos)))
        total += writer.end
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        atomic_write_json(folder / INDEX, index)


def _spread(groups: Sequence[Group], max_shard_bytes: int) -> list[list[Group]]:
    shards: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    return shards


def _header(entries: Mapping[str, dict]) -> bytes:
    content = {"__metadata__": {"format": "pt"}, **entries}
    return json.dumps(content, separators=(",", ":")).encode()


def _entry(info: TensorInfo, start: int) -> dict:
    offsets = [start, start + _nbytes(info)]
    return {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _text_info(length: int) -> TensorInfo:
    return TensorInfo((length,), np.dtype(np.uint8))
