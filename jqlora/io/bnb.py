"""bitsandbytes' 4-bit layout in safetensors, read and written without requantizing.

For a module ``m`` the files hold (functional.py, ``QuantState.as_dict(packed=True)``):

* ``m.weight``: the packed codes of the row-major (out, in) weight, uint8 [ceil(n/2), 1], or the
  same bytes viewed as another storage type;
* ``m.weight.absmax``: fp32 [blocks], or uint8 when doubly quantized;
* ``m.weight.nested_absmax``, ``m.weight.nested_quant_map``: the second level, if there is one;
* ``m.weight.quant_map``: the 16 values of the codes;
* ``m.weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``): the rest as JSON in a uint8 tensor.
"""

import json
import math
from collections.abc import Collection, Sequence, Set
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqlora.errors import CheckpointError, ConfigError
from jqlora.io.readers import TensorInfo, TensorReader
from jqlora.io.stored import Format, Settings, Stored
from jqlora.quant import FP4, NF4, NestedScales, QTensor, Storage, dynamic_map, leaf_shapes
from jqlora.quant.layout import with_layout
from jqlora.quant.spec import FourBit
from jqlora_kernels.layouts import BITSANDBYTES

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_GROUP = 256  # scales under one second-level absmax, in QTensor and in what bitsandbytes writes
_KINDS: dict[str, type[FourBit]] = {kind.scheme: kind for kind in (NF4, FP4)}
_DTYPES = ("float32", "bfloat16", "float16")


def state_name(name: str, scheme: str) -> str:
    """Where the JSON of the quantized weight ``name`` is stored."""
    return f"{name}.quant_state.bitsandbytes__{scheme}"


def find(reader: TensorReader, name: str, present: Set[str], settings: Settings) -> Stored | None:
    """See ``Format``."""
    keys = [key for s in _KINDS if (key := state_name(name, s)) in present]
    if not keys:
        return None
    where = f"{reader.where(name)}: quantized tensor {name!r}"
    nested = f"{name}.nested_absmax" in present
    needed = (name, *(f"{name}.{part}" for part in (_PARTS if nested else _PARTS[:2])))
    missing = [part for part in needed if part not in present]
    if len(keys) > 1 or missing:
        raise CheckpointError(f"{where}: {f'lacks {missing[0]!r}' if missing else 'two states'}")
    try:
        state: dict[str, Any] = json.loads(reader.read(keys[0]).tobytes())
        scheme = _KINDS[state["quant_type"]]
        outputs, inputs = map(int, state["shape"])
        options = {"block": int(state["blocksize"]), "storage": reader.info(name).dtype.name}
        dtype = _DTYPES[_DTYPES.index(state["dtype"])]
        offset = float(state["nested_offset"]) if nested else 0.0
        group = int(state["nested_blocksize"]) if nested else _GROUP
        spec = scheme(**options)
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        reason = error if isinstance(error, ConfigError) else repr(error)
        raise CheckpointError(f"{where}: cannot use its quantization state: {reason}") from error
    if not _same(reader.read(f"{name}.quant_map"), spec.codebook):
        raise CheckpointError(f"{where}: its codes mean other values than {spec.scheme}'s")
    ours = group == _GROUP and nested
    if ours and _same(reader.read(f"{name}.nested_quant_map"), dynamic_map()):
        spec = scheme(**options, double_quant=True)
    remark = ""
    if nested and not spec.double_quant:
        remark = "second-level scales of another code, kept as fp32"
    shape = (inputs, outputs)
    _check_sizes(reader, name, spec, shape, group if nested else None, where)
    return Stored(
        spec,
        shape,
        dtype,
        (*needed, keys[0]),
        lambda: _read(reader, name, spec, shape, dtype, offset if nested else None, group),
        remark,
    )


def _read(
    reader: TensorReader,
    name: str,
    spec: Storage,
    shape: tuple[int, int],
    dtype: str,
    offset: float | None,
    group: int,
) -> QTensor:
    """The weight with the stored codes and scales.

    A second level (``offset``) of another map or group size than ``QTensor`` has, of which
    ``spec`` says nothing, is decoded to fp32, exactly.
    """
    codes: Any = reader.read(name).reshape(-1).view(np.uint8)
    scales: Any = reader.read(f"{name}.absmax")
    nested = None
    if offset is not None:
        absmax: Any = reader.read(f"{name}.nested_absmax")
        mean: Any = np.float32(offset)
        if spec.double_quant:
            nested = NestedScales(absmax, mean)
        else:
            table = reader.read(f"{name}.nested_quant_map")
            scales = table[scales] * absmax[np.arange(scales.size) // group] + mean
    shapes = leaf_shapes(shape, spec)
    return QTensor(
        codes.reshape(shapes["codes"]),
        scales.reshape(shapes["scales"]),
        nested,
        spec=spec,
        matrix_shape=shape,
        dtype=np.dtype(dtype),
    )


def infos(name: str, spec: Storage, matrix_shape: tuple[int, int]) -> dict[str, TensorInfo]:
    """See ``Format``; raises CheckpointError where codes cannot be viewed as the storage type."""
    assert isinstance(spec, FourBit)
    count = math.prod(matrix_shape)
    blocks = -(-count // spec.block)
    byte, float32 = np.dtype(np.uint8), np.dtype(np.float32)
    view = np.dtype(jnp.dtype(spec.storage))
    packed = -(-count // 2)
    if packed % view.itemsize:
        raise CheckpointError(f"{name!r}: {packed} bytes of codes cannot be viewed as {view}")
    found = {
        name: TensorInfo((packed // view.itemsize, 1), view),
        f"{name}.absmax": TensorInfo((blocks,), byte if spec.double_quant else float32),
        f"{name}.quant_map": TensorInfo((16,), float32),
    }
    if spec.double_quant:
        found[f"{name}.nested_absmax"] = TensorInfo((-(-blocks // _GROUP),), float32)
        found[f"{name}.nested_quant_map"] = TensorInfo((256,), float32)
    return found


def encode(name: str, q: QTensor) -> dict[str, np.ndarray]:
    """See ``Format``. Files know bitsandbytes' layout alone: another one is undone."""
    q = with_layout(q, BITSANDBYTES)
    asked = infos(name, q.spec, q.matrix_shape)
    inputs, outputs = q.matrix_shape
    state: dict[str, Any] = {
        "quant_type": q.scheme,
        "blocksize": q.block,
        "dtype": np.dtype(q.dtype).name,
        "shape": [outputs, inputs],
    }
    codes = np.ascontiguousarray(q.codes).reshape(-1).view(asked[name].dtype)
    arrays = {name: codes, f"{name}.absmax": q.scales, f"{name}.quant_map": q.codebook}
    if q.nested is not None:
        arrays[f"{name}.nested_absmax"] = q.nested.absmax
        arrays[f"{name}.nested_quant_map"] = dynamic_map()
        offset = float(q.nested.offset)
        state |= {"nested_blocksize": _GROUP, "nested_dtype": "float32", "nested_offset": offset}
    parts = {key: np.asarray(array).reshape(asked[key].shape) for key, array in arrays.items()}
    parts[state_name(name, q.scheme)] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return parts


def config(
    specs: Collection[Storage], weights: Collection[str], kept: Sequence[str], dtype: str
) -> dict[str, Any]:
    """See ``Format``; raises CheckpointError if ``specs`` differ in more than their block."""
    kinds = {
        (spec.scheme, spec.double_quant, spec.storage)
        for spec in specs
        if isinstance(spec, FourBit)
    }
    if len(kinds) > 1:
        raise CheckpointError(f"weights of several kinds, {sorted(kinds)}, cannot share a config")
    scheme, double_quant, storage = kinds.pop()
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": scheme,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": storage,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
        # lm_head is named even where it is tied, and so no tensor of the file
        "llm_int8_skip_modules": list(dict.fromkeys([*kept, "lm_head"])),
    }


def _same(stored: np.ndarray, table: np.ndarray) -> bool:
    return stored.dtype == table.dtype and np.array_equal(stored.reshape(-1), table)


def _check_sizes(
    reader: TensorReader,
    name: str,
    spec: FourBit,
    shape: tuple[int, int],
    group: int | None,
    where: str,
) -> None:
    """``group``: the scales under each of a second level, if there is one."""
    blocks = -(-math.prod(shape) // spec.block)
    try:
        asked = infos(name, spec, shape)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    byte, float32 = np.dtype(np.uint8), np.dtype(np.float32)
    asked[f"{name}.absmax"] = TensorInfo((blocks,), float32 if group is None else byte)
    if group is not None:
        asked[f"{name}.nested_absmax"] = TensorInfo((-(-blocks // group),), float32)
    for key, (expected, dtype) in asked.items():
        found = reader.info(key)
        if math.prod(found.shape) != math.prod(expected) or found.dtype != dtype:
            raise CheckpointError(
                f"{where}: {key!r} is {found.dtype} {list(found.shape)}, expected {list(expected)}"
                f" of {dtype} for a weight {list(reversed(shape))}"
            )


FORMAT = Format(
    find=find,
    infos=infos,
    encode=encode,
    config=config,
    texts=lambda name, spec: (state_name(name, spec.scheme),),
)
