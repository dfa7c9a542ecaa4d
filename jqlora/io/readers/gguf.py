"""Weights of a ``.gguf`` file under their Hugging Face names.

What llama.cpp stores differently from HF is undone here, by ``gguf_names``. Block-quantized tensors
are decoded to float32, exactly, by the ``gguf`` package, a few rows at a time so that its
temporaries stay small.
"""

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, dequantize

from jqlora.errors import CheckpointError
from jqlora.io.readers.base import TensorInfo
from jqlora.io.readers.gguf_header import GGUFHeader, field
from jqlora.io.readers.gguf_names import ARCHITECTURES
from jqlora.io.readers.raw import aligned_empty

# parts of the config, see gguf_config
_NOT_WEIGHTS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
_PLAIN: dict[GGMLQuantizationType, np.dtype] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_CHUNK = 1 << 20  # elements decoded at once


class GGUFTensors:
    """Reader of the tensors of one GGUF file, named and ordered as in Hugging Face's layout."""

    def __init__(self, header: GGUFHeader):
        self._header = header
        architecture = field(header, "general.architecture")
        self._stored = ARCHITECTURES[architecture]
        self._heads: dict[str, int] = {}
        if self._stored.interleaved:
            heads = field(header, f"{architecture}.attention.head_count")
            self._heads = {
                "q_proj": heads,
                "k_proj": field(header, f"{architecture}.attention.head_count_kv", heads),
            }
        weights = [tensor for tensor in header.tensors if tensor.name not in _NOT_WEIGHTS]
        self._tensors = {self._stored.hf_name(tensor.name): tensor for tensor in weights}

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        shape = tensor.shape[::-1] if self._is_turned(name) else tensor.shape
        return TensorInfo(shape, _PLAIN.get(tensor.kind, np.dtype(np.float32)))

    def where(self, name: str) -> str:
        return str(self._header.path)

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        shape = tensor.shape
        rows = self._header.read(tensor).reshape((*shape[:-1], -1))
        heads = self._heads.get(name.split(".")[-2])
        if heads:
            rows = unpermute(rows, heads)
        if tensor.kind in _PLAIN:
            value = rows.view(_PLAIN[tensor.kind]).reshape(shape)
        else:
            value = self._decode(name, rows.reshape(-1, rows.shape[-1]), shape)
        if self._stored.norm_offset and name.endswith("norm.weight"):
            value = value - value.dtype.type(self._stored.norm_offset)
        return value.T if self._is_turned(name) else value

    def _is_turned(self, name: str) -> bool:
        return name.endswith(".weight") and name.split(".")[-2] in self._stored.in_out

    def _decode(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        kind = self._tensors[name].kind
        out = aligned_empty((rows.shape[0], shape[-1]), np.float32)
        step = max(1, _CHUNK // shape[-1])
        try:
            for start in range(0, len(rows), step):
                out[start : start + step] = dequantize(rows[start : start + step], kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self._header.path}: tensor {name!r} has the type {kind.name}, which the gguf "
                "package cannot decode; convert the model to Q8_0, Q4_K or F16"
            ) from None
        return out.reshape(shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads·d, ...] with rotary pairs adjacent → with the two halves of each head apart."""
    half = rows.shape[0] // heads // 2
    split = rows.reshape(heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
