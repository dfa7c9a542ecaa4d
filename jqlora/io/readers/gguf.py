"""Weights of a ``.gguf`` file under their Hugging Face names.

What llama.cpp stores differently from HF is undone here, by ``gguf_names``. Block-quantized tensors
are decoded to float32, exactly, by the ``gguf`` package, a few rows at a time so that its
temporaries stay small.
"""

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize

from jqlora.errors import CheckpointError
from jqlora.io.readers.base import TensorInfo
from jqlora.io.readers.gguf_names import ARCHITECTURES
from jqlora.io.readers.raw import aligned_empty, read_bytes

# parts of the config, see gguf_config
_NOT_WEIGHTS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
_PLAIN: dict[GGMLQuantizationType, np.dtype] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_CHUNK = 1 << 20  # elements decoded at once


class CheckedGGUFReader(GGUFReader):
    """``gguf.GGUFReader`` that names the tensor in which a file ends too early."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
            end = start_offs + int(offset[0]) + int(np.prod(dims)) * size // block
            if end > self.data.size:
                raise CheckpointError(
                    f"tensor {bytes(name).decode()!r} ends at byte {end}, "
                    f"the file has {self.data.size}"
                )
        super()._build_tensors(start_offs, fields)


def open_gguf(path: Path) -> GGUFReader:
    """The parsed header of ``path``. Raises CheckpointError if it is damaged or truncated.

    Parsing the vocabulary takes seconds, and model and tokenizer both need it: the last header is
    kept, for as long as the file does not change.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return _parse(path.resolve(), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def _parse(path: Path, changed: int, size: int) -> GGUFReader:
    del changed, size  # part of the key
    try:
        reader = CheckedGGUFReader(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is truncated: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the parser trusts the file: damage can end in any error
        raise CheckpointError(
            f"{path} is truncated or not a GGUF file: {type(error).__name__}: {error}"
        ) from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} was written for machines of other byte order")
    if "split.count" in reader.fields and field(reader, "split.count") > 1:
        raise CheckpointError(f"{path} is one part of a split model: join it with gguf-split first")
    return reader


def field(reader: GGUFReader, key: str, default: Any = ...) -> Any:
    """The metadata value ``key``; CheckpointError if it is absent and no default is given."""
    found = reader.get_field(key)
    if found is not None:
        return found.contents()
    if default is ...:
        raise CheckpointError(f"the GGUF metadata lack {key!r}")
    return default


class GGUFTensors:
    """Reader of the tensors of one GGUF file, named and ordered as in Hugging Face's layout."""

    def __init__(self, path: Path, reader: GGUFReader):
        self.path = path
        architecture = field(reader, "general.architecture")
        self._stored = ARCHITECTURES[architecture]
        self._heads: dict[str, int] = {}
        if self._stored.interleaved:
            heads = field(reader, f"{architecture}.attention.head_count")
            self._heads = {
                "q_proj": heads,
                "k_proj": field(reader, f"{architecture}.attention.head_count_kv", heads),
            }
        weights = [tensor for tensor in reader.tensors if tensor.name not in _NOT_WEIGHTS]
        self._tensors = {self._stored.hf_name(tensor.name): tensor for tensor in weights}

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        shape = self._file_shape(name)
        shape = shape[::-1] if self._is_turned(name) else shape
        return TensorInfo(shape, _PLAIN.get(tensor.tensor_type, np.dtype(np.float32)))

    def where(self, name: str) -> str:
        return str(self.path)

    def read(self, name: str) -> np.ndarray:
        tensor, shape = self._tensors[name], self._file_shape(name)
        raw = read_bytes(self.path, tensor.data_offset, tensor.n_bytes)
        if raw.size != tensor.n_bytes:
            raise CheckpointError(f"{self.path} was truncated while reading tensor {name!r}")
        rows = raw.reshape((*shape[:-1], -1))
        heads = self._heads.get(name.split(".")[-2])
        if heads:
            rows = unpermute(rows, heads)
        if tensor.tensor_type in _PLAIN:
            value = rows.view(_PLAIN[tensor.tensor_type]).reshape(shape)
        else:
            value = self._decode(name, rows.reshape(-1, rows.shape[-1]), shape)
        if self._stored.norm_offset and name.endswith("norm.weight"):
            value = value - value.dtype.type(self._stored.norm_offset)
        return value.T if self._is_turned(name) else value

    def _file_shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def _is_turned(self, name: str) -> bool:
        return name.endswith(".weight") and name.split(".")[-2] in self._stored.in_out

    def _decode(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        kind = self._tensors[name].tensor_type
        out = aligned_empty((rows.shape[0], shape[-1]), np.float32)
        step = max(1, _CHUNK // shape[-1])
        try:
            for start in range(0, len(rows), step):
                out[start : start + step] = dequantize(rows[start : start + step], kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has the type {kind.name}, which the gguf package "
                "cannot decode; convert the model to Q8_0, Q4_K or F16"
            ) from None
        return out.reshape(shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads·d, ...] with rotary pairs adjacent → with the two halves of each head apart."""
    half = rows.shape[0] // heads // 2
    split = rows.reshape(heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
