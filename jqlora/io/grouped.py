"""GPTQ's and AWQ's checkpoints: integers in groups of inputs, read and written as they are.

For a module ``m`` with K inputs and N outputs, in groups of ``g`` inputs, the files hold
``m.qweight`` and ``m.qzeros`` of packed int32 words and ``m.scales`` [K/g, N]; the weight is
``(code - zero) * scale``, and

* in GPTQ's words follow each other along the inputs, qweight [K b/32, N], and zero points along
  the outputs, qzeros [K/g, N b/32], stored less one ("gptq") or as they are ("gptq_v2").
  ``m.g_idx`` int32 [K] is the group of each input; with ``desc_act`` groups are no neighbours;
* AWQ's (gemm) go along the outputs, qweight [K, N/8] and qzeros [K/g, N/8], in the order of
  ``AWQ_ORDER``, zero points as they are.

A GPTQ zero point of 16 is stored as 15 and read as 16: some programs read it as 0, and none says.
"""

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

import numpy as np

from jqlora.errors import CheckpointError
from jqlora.io.readers import TensorInfo, TensorReader
from jqlora.io.stored import Format, Settings, Stored, module_of
from jqlora.io.words import apart, pack_awq, pack_words, pairs, unpack_awq, unpack_words
from jqlora.quant import GroupInt, QTensor, Storage, with_layout
from jqlora_kernels.layouts import BITSANDBYTES

FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
BITS = {"gptq": (4, 8), "awq": (4,)}
_SCALES = ("float16", "bfloat16", "float32")


def spec_of(config: Mapping[str, Any], scale_dtype: str = "float16") -> GroupInt:
    """What a ``quantization_config`` of GPTQ or AWQ says of every weight.

    Raises CheckpointError naming the field for a format or a number of bits that is not read.
    """
    method = config["quant_method"]
    asked = [config.get(key) for key in ("checkpoint_format", "format", "version")]
    form = str(next((word for word in asked if word), FORMATS[method][0])).lower()
    bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", -1)
    if form not in FORMATS[method]:
        raise CheckpointError(
            f"is {method} in the format {form!r}; accepted: {', '.join(FORMATS[method])}"
        )
    if bits not in BITS[method]:
        accepted = " or ".join(map(str, BITS[method]))
        raise CheckpointError(f"is {method} of bits={bits!r}; accepted: {accepted}")
    if not isinstance(group, int) or not (group == -1 or (group > 0 and group % 8 == 0)):
        raise CheckpointError(f"has group_size={group!r}; accepted: -1 or multiples of 8")
    gptq = method == "gptq"
    return GroupInt(
        format=form if gptq else "awq",
        bits=bits,
        group=group,
        symmetric=gptq and bool(config.get("sym", True)),
        ordered=gptq and bool(config.get("desc_act")) and group != -1,
        scale_dtype=scale_dtype,
    )


def find(reader: TensorReader, name: str, present: Set[str], settings: Settings) -> Stored | None:
    """See ``Format``."""
    module = module_of(name)
    words = f"{module}.qweight"
    if words not in present:
        return None
    where = f"{reader.where(words)}: quantized tensor {words!r}"
    if settings.config.get("quant_method") not in FORMATS:
        raise CheckpointError(f"{where}: config.json has no quantization_config of gptq or awq")
    scales = f"{module}.scales"
    kind = reader.info(scales).dtype.name if scales in present else "missing"
    if kind not in _SCALES:
        raise CheckpointError(f"{where}: {scales!r} is {kind}, expected one of {_SCALES}")
    spec = spec_of(settings.config, kind)
    rows, columns = reader.info(words).shape
    per_word = 32 // spec.bits
    shape = (rows, columns * per_word) if spec.format == "awq" else (rows * per_word, columns)
    if shape[0] % spec.block_in(shape[0]) or shape[1] % per_word:
        raise CheckpointError(f"{where}: a weight {list(shape[::-1])} in groups of {spec.group}")
    asked = infos(name, spec, shape)
    for key, info in asked.items():
        found = reader.info(key) if key in present else None
        if found != info:
            told = f"{found.dtype} {list(found.shape)}" if found else "missing"
            raise CheckpointError(
                f"{where}: {key!r} is {told}, expected {list(info.shape)} of {info.dtype}"
            )
    return Stored(spec, shape, kind, tuple(asked), lambda: _read(reader, name, spec, shape, where))


def _read(
    reader: TensorReader, name: str, spec: GroupInt, shape: tuple[int, int], where: str
) -> QTensor:
    module, block = module_of(name), spec.block_in(shape[0])
    words, points = reader.read(f"{module}.qweight"), reader.read(f"{module}.qzeros")
    order = None
    if spec.format == "awq":
        codes, points = unpack_awq(words).T, unpack_awq(points)
    else:
        codes, points = unpack_words(words.T, spec.bits), unpack_words(points, spec.bits)
        order = _order(reader.read(f"{module}.g_idx"), block, spec, where)
        codes = codes if order is None else codes[:, order]
    zeros = points.T.astype(np.int16) - _stored_middle(spec)
    if spec.symmetric and zeros.any():
        raise CheckpointError(
            f"{where}: has zero points off the middle, but config.json says sym; set it to false"
        )
    scales: Any = reader.read(f"{module}.scales").T.astype(np.float32)
    kept: Any = pairs(codes) if spec.bits == 4 else codes
    off_middle: Any = None if spec.symmetric else zeros
    return QTensor(
        kept,
        scales,
        None,
        spec=spec,
        matrix_shape=shape,
        dtype=np.dtype(spec.scale_dtype),
        zeros=off_middle,
        order=order,
    )


def _order(groups: np.ndarray, block: int, spec: GroupInt, where: str) -> Any:
    """Inputs sorted by their groups, or None where groups are neighbours."""
    neighbours = np.arange(groups.size) // block
    if not spec.ordered:
        if not np.array_equal(groups, neighbours):
            raise CheckpointError(
                f"{where}: its groups are no neighbours, but config.json says no desc_act"
            )
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], neighbours):
        raise CheckpointError(f"{where}: its groups are not all of {block} inputs")
    return order


def _stored_middle(spec: GroupInt) -> np.int16:
    """What files hold for the zero point in the middle of the codes."""
    return np.int16(2 ** (spec.bits - 1) - (spec.format == "gptq"))


def infos(name: str, spec: Storage, matrix_shape: tuple[int, int]) -> dict[str, TensorInfo]:
    """See ``Format``."""
    assert isinstance(spec, GroupInt)
    inputs, outputs = matrix_shape
    module, groups = module_of(name), inputs // spec.block_in(inputs)
    word, per_word = np.dtype(np.int32), 32 // spec.bits
    words = (inputs // per_word, outputs)
    if spec.format == "awq":
        words = (inputs, outputs // per_word)
    parts = {
        f"{module}.qweight": TensorInfo(words, word),
        f"{module}.qzeros": TensorInfo((groups, outputs // per_word), word),
        f"{module}.scales": TensorInfo((groups, outputs), np.dtype(spec.scale_dtype)),
    }
    if spec.format != "awq":
        parts[f"{module}.g_idx"] = TensorInfo((inputs,), word)
    return parts


def encode(name: str, q: QTensor) -> dict[str, np.ndarray]:
    """See ``Format``."""
    spec = q.spec
    assert isinstance(spec, GroupInt)
    q = with_layout(q, BITSANDBYTES)
    module, inputs = module_of(name), q.matrix_shape[0]
    codes = np.asarray(q.codes)
    codes = apart(codes) if spec.bits == 4 else codes
    shape = np.shape(q.scales)
    zeros = np.zeros(shape, np.int16) if q.zeros is None else np.asarray(q.zeros)
    points = (zeros + _stored_middle(spec)).astype(np.uint8).T
    parts = {f"{module}.scales": np.asarray(q.scales).T.astype(spec.scale_dtype)}
    if spec.format == "awq":
        words = {"qweight": pack_awq(codes.T), "qzeros": pack_awq(points)}
        return parts | {f"{module}.{key}": value for key, value in words.items()}
    groups = np.arange(inputs, dtype=np.int32) // np.int32(q.block)
    if q.order is not None:
        back = np.argsort(np.asarray(q.order), kind="stable")
        codes, groups = codes[:, back], groups[back]
    return parts | {
        f"{module}.qweight": np.ascontiguousarray(pack_words(codes, spec.bits).T),
        f"{module}.qzeros": pack_words(points, spec.bits),
        f"{module}.g_idx": groups,
    }


def config(
    specs: Collection[Storage], weights: Collection[str], kept: Sequence[str], dtype: str
) -> dict[str, Any]:
    """See ``Format``; one config says the same of all weights, or CheckpointError is raised."""
    if len(set(specs)) > 1:
        raise CheckpointError(f"weights of several kinds cannot share a config: {set(specs)}")
    spec = next(iter(specs))
    assert isinstance(spec, GroupInt)
    common = {"bits": spec.bits, "group_size": spec.group}
    kept = [module for module in kept if module != "lm_head"]
    if spec.format == "awq":
        settings = {"version": "gemm", "zero_point": True, "modules_to_not_convert": kept or None}
        return {"quant_method": "awq", **common, **settings}
    # GPTQModel's way to say which modules are whole
    dynamic = {f"-:^{module.replace('.', chr(92) + '.')}$": {} for module in kept}
    return {
        "quant_method": "gptq",
        **common,
        "checkpoint_format": spec.format,
        "desc_act": spec.ordered,
        "sym": spec.symmetric,
        "lm_head": any(module_of(weight) == "lm_head" for weight in weights),
        **({"dynamic": dynamic} if dynamic else {}),
    }


def is_unused_bias(reader: TensorReader, name: str, present: Set[str]) -> bool:
    """Whether a tensor is the bias of zeros that AutoGPTQ gave to modules without one."""
    module = name.removesuffix(".bias")
    if module == name or f"{module}.qweight" not in present:
        return False
    return not reader.read(name).any()


FORMAT = Format(find=find, infos=infos, encode=encode, config=config)
