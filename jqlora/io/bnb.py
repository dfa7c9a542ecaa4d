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
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqlora.errors import CheckpointError, ConfigError
from jqlora.io.readers import TensorInfo, TensorReader
from jqlora.quant import NestedScales, QTensor, Storage, dynamic_map, leaf_shapes
from jqlora.quant.layout import with_layout
from jqlora.quant.schemes import SCHEMES
from jqlora.quant.spec import FourBit
from jqlora_kernels.layouts import BITSANDBYTES

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_GROUP = 256  # scales under one second-level absmax, in QTensor and in what bitsandbytes writes
FOUR_BIT = tuple(name for name, row in SCHEMES.items() if issubclass(row, FourBit))
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class StoredQuant:
    """How one weight is quantized in a file, and with which spec it is held in memory.

    ``spec.double_quant`` is False for a second level (``nested``) of another map or group size than
    ``QTensor`` has: its scales are then decoded to fp32, exactly.
    """

    name: str
    spec: Storage
    matrix_shape: tuple[int, int]
    dtype: str
    nested: bool
    offset: float
    group: int


def state_name(name: str, scheme: str) -> str:
    """Where the JSON of the quantized weight ``name`` is stored."""
    return f"{name}.quant_state.bitsandbytes__{scheme}"


def part_names(name: str) -> list[str]:
    """Every name, beside its own, under which parts of the weight ``name`` may be stored."""
    return [*(f"{name}.{part}" for part in _PARTS), *(state_name(name, s) for s in FOUR_BIT)]


def find_stored(reader: TensorReader, name: str, present: Set[str]) -> StoredQuant | None:
    """How the weight ``name`` is quantized, or None if it is a plain tensor; reads no codes.

    ``present`` are the reader's names. Raises CheckpointError naming file and tensor if the parts
    are incomplete or disagree.
    """
    keys = [key for s in FOUR_BIT if (key := state_name(name, s)) in present]
    if not keys:
        return None
    where = f"{reader.where(name)}: quantized tensor {name!r}"
    nested = f"{name}.nested_absmax" in present
    needed = _PARTS if nested else _PARTS[:2]
    missing = [f"{name}.{part}" for part in needed if f"{name}.{part}" not in present]
    if len(keys) > 1 or missing:
        raise CheckpointError(f"{where}: {f'lacks {missing[0]!r}' if missing else 'two states'}")
    try:
        state: dict[str, Any] = json.loads(reader.read(keys[0]).tobytes())
        scheme = SCHEMES[state["quant_type"]]
        outputs, inputs = map(int, state["shape"])
        block, dtype = int(state["blocksize"]), _DTYPES[_DTYPES.index(state["dtype"])]
        offset = float(state["nested_offset"]) if nested else 0.0
        group = int(state["nested_blocksize"]) if nested else _GROUP
        spec = scheme(block=block)
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        reason = error if isinstance(error, ConfigError) else repr(error)
        raise CheckpointError(f"{where}: cannot use its quantization state: {reason}") from error
    if not _same(reader.read(f"{name}.quant_map"), spec.codebook):
        raise CheckpointError(f"{where}: its codes mean other values than {scheme.scheme}'s")
    ours = group == _GROUP and nested
    if ours and _same(reader.read(f"{name}.nested_quant_map"), dynamic_map()):
        spec = scheme(block=block, double_quant=True)
    stored = StoredQuant(name, spec, (inputs, outputs), dtype, nested, offset, group)
    _check_sizes(reader, stored, where)
    return stored


def read_qtensor(reader: TensorReader, stored: StoredQuant) -> QTensor:
    """The weight as a ``QTensor`` of host arrays, with the stored codes and scales."""
    name, spec = stored.name, stored.spec
    codes = reader.read(name).reshape(-1).view(np.uint8)
    scales = reader.read(f"{name}.absmax")
    nested = None
    if stored.nested:
        absmax, offset = reader.read(f"{name}.nested_absmax"), np.float32(stored.offset)
        if spec.double_quant:
            nested = NestedScales(jnp.asarray(absmax), jnp.asarray(offset))
        else:
            table = reader.read(f"{name}.nested_quant_map")
            groups = np.arange(scales.size) // stored.group
            scales = table[scales] * absmax[groups] + offset
    shapes = leaf_shapes(stored.matrix_shape, spec)
    return QTensor(
        jnp.asarray(codes.reshape(shapes["codes"])),
        jnp.asarray(scales.reshape(shapes["scales"])),
        nested,
        spec=spec,
        matrix_shape=stored.matrix_shape,
        dtype=np.dtype(stored.dtype),
    )


def file_infos(name: str, matrix_shape: tuple[int, int], spec: Storage) -> dict[str, TensorInfo]:
    """Shapes and dtypes in the file of all parts of a weight, but its state's JSON."""
    count = math.prod(matrix_shape)
    blocks = -(-count // spec.block_in(matrix_shape[0]))
    byte, float32 = np.dtype(np.uint8), np.dtype(np.float32)
    infos = {
        name: TensorInfo((-(-count // 2), 1), byte),
        f"{name}.absmax": TensorInfo((blocks,), byte if spec.double_quant else float32),
        f"{name}.quant_map": TensorInfo((16,), float32),
    }
    if spec.double_quant:
        infos[f"{name}.nested_absmax"] = TensorInfo((-(-blocks // _GROUP),), float32)
        infos[f"{name}.nested_quant_map"] = TensorInfo((256,), float32)
    return infos


def encode(name: str, q: QTensor) -> dict[str, np.ndarray]:
    """All parts of one matrix (no lead axes) under their names in the file.

    Files know bitsandbytes' layout alone: another one is undone.
    """
    q = with_layout(q, BITSANDBYTES)
    infos = file_infos(name, q.matrix_shape, q.spec)
    inputs, outputs = q.matrix_shape
    state: dict[str, Any] = {
        "quant_type": q.scheme,
        "blocksize": q.block,
        "dtype": np.dtype(q.dtype).name,
        "shape": [outputs, inputs],
    }
    arrays = {name: q.codes, f"{name}.absmax": q.scales, f"{name}.quant_map": q.codebook}
    if q.nested is not None:
        arrays[f"{name}.nested_absmax"] = q.nested.absmax
        arrays[f"{name}.nested_quant_map"] = dynamic_map()
        offset = float(q.nested.offset)
        state |= {"nested_blocksize": _GROUP, "nested_dtype": "float32", "nested_offset": offset}
    parts = {key: np.asarray(array).reshape(infos[key].shape) for key, array in arrays.items()}
    parts[state_name(name, q.scheme)] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return parts


def _same(stored: np.ndarray, table: np.ndarray) -> bool:
    return stored.dtype == table.dtype and np.array_equal(stored.reshape(-1), table)


def _check_sizes(reader: TensorReader, stored: StoredQuant, where: str) -> None:
    """Codes may be viewed as any storage type, so bytes are compared; the other parts by dtype."""
    blocks = -(-math.prod(stored.matrix_shape) // stored.spec.block_in(0))
    asked = file_infos(stored.name, stored.matrix_shape, stored.spec)
    asked[f"{stored.name}.absmax"] = TensorInfo(
        (blocks,), np.dtype("u1" if stored.nested else "f4")
    )
    if stored.nested:
        groups = -(-blocks // stored.group)
        asked[f"{stored.name}.nested_absmax"] = TensorInfo((groups,), np.dtype(np.float32))
    for key, (shape, dtype) in asked.items():
        found = reader.info(key)
        size = math.prod(found.shape) * found.dtype.itemsize
        right = key == stored.name or found.dtype == dtype
        if size != math.prod(shape) * dtype.itemsize or not right:
            raise CheckpointError(
                f"{where}: {key!r} is {found.dtype} {list(found.shape)}, expected {list(shape)}"
                f" of {dtype} for a weight {list(reversed(stored.matrix_shape))}"
            )
