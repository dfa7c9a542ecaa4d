"""bitsandbytes' 8-bit checkpoints, made for LLM.int8(), read and written without requantizing.

For a module ``m`` the files hold ``m.weight``, int8 [out, in]; ``m.SCB``, fp32 [out], the largest
magnitude of each row; and ``m.weight_format``, a uint8 scalar, 0 for rows (the only one written
today). The weight is ``weight * SCB / 127``. How that product is rounded differs within
bitsandbytes itself by the last bits of fp32, and so does ours: ``(weight / 127) * SCB``.
"""

from collections.abc import Collection, Sequence, Set
from typing import Any

import numpy as np

from jqlora.errors import CheckpointError
from jqlora.io.readers import TensorInfo, TensorReader
from jqlora.io.stored import Format, Settings, Stored, module_of
from jqlora.quant import QTensor, RowInt8, Storage, with_layout
from jqlora_kernels.layouts import BITSANDBYTES

_ROWS = 0


def find(reader: TensorReader, name: str, present: Set[str], settings: Settings) -> Stored | None:
    """See ``Format``; raises CheckpointError for another layout than rows."""
    module = module_of(name)
    scales, layout = f"{module}.SCB", f"{module}.weight_format"
    if scales not in present:
        return None
    where = f"{reader.where(scales)}: quantized tensor {name!r}"
    if name not in present:
        raise CheckpointError(f"{where}: is missing beside {scales!r}")
    if layout in present and (found := int(reader.read(layout).reshape(()))) != _ROWS:
        raise CheckpointError(f"{where}: {layout!r} is {found}, but 0 (rows) alone can be read")
    stored, beside = reader.info(name), reader.info(scales)
    if stored.dtype != np.int8 or len(stored.shape) != 2:
        raise CheckpointError(f"{where}: is {stored.dtype} {list(stored.shape)}, expected int8")
    outputs, inputs = stored.shape
    if beside != TensorInfo((outputs,), np.dtype(np.float32)):
        raise CheckpointError(
            f"{where}: {scales!r} is {beside.dtype} {list(beside.shape)}, expected [{outputs}]"
            " of float32"
        )
    spec = RowInt8(threshold=float(settings.config.get("llm_int8_threshold", 6.0)))

    def read() -> QTensor:
        codes: Any = reader.read(name).view(np.uint8)
        rows: Any = reader.read(scales).reshape(outputs, 1)
        return QTensor(
            codes,
            rows,
            None,
            spec=spec,
            matrix_shape=(inputs, outputs),
            dtype=np.dtype(settings.dtype),
        )

    parts = tuple(part for part in (name, scales, layout) if part in present)
    return Stored(spec, (inputs, outputs), settings.dtype, parts, read)


def infos(name: str, spec: Storage, matrix_shape: tuple[int, int]) -> dict[str, TensorInfo]:
    """See ``Format``."""
    inputs, outputs = matrix_shape
    module = module_of(name)
    return {
        name: TensorInfo((outputs, inputs), np.dtype(np.int8)),
        f"{module}.SCB": TensorInfo((outputs,), np.dtype(np.float32)),
        f"{module}.weight_format": TensorInfo((), np.dtype(np.uint8)),
    }


def encode(name: str, q: QTensor) -> dict[str, np.ndarray]:
    """See ``Format``."""
    q = with_layout(q, BITSANDBYTES)
    module = module_of(name)
    return {
        name: np.asarray(q.codes).view(np.int8),
        f"{module}.SCB": np.asarray(q.scales).reshape(-1),
        f"{module}.weight_format": np.array(_ROWS, np.uint8),
    }


def config(
    specs: Collection[Storage], weights: Collection[str], kept: Sequence[str], dtype: str
) -> dict[str, Any]:
    """See ``Format``."""
    thresholds = {spec.threshold for spec in specs if isinstance(spec, RowInt8)}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": max(thresholds),
        "llm_int8_skip_modules": list(dict.fromkeys([*kept, "lm_head"])),
    }


FORMAT = Format(find=find, infos=infos, encode=encode, config=config)
