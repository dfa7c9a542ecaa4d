"""A matrix stored as 4-bit or 8-bit codes, and still a leaf of the parameter tree."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jqlora.quant.codebooks import dynamic_map
from jqlora.quant.spec import Storage
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.layouts import BITSANDBYTES
from jqlora_kernels.scales import GROUP, Affine, Nested


@flax.struct.dataclass
class NestedScales:
    """Second-level scales: scale i is ``dynamic_map()[code] * absmax[i // 256] + offset``.

    i counts the scales of one matrix. ``absmax`` f32 [*lead, groups]; ``offset`` f32 [*lead], the
    mean that was taken off before.
    """

    absmax: jax.Array
    offset: jax.Array


@flax.struct.dataclass
class QTensor:
    """The kernel [*lead, K, N] of a dense layer, quantized in blocks.

    Invariants:

    * It stands for ``W[n, k] = codebook[code[n, k]] * scale[block of (n, k)]``, computed in fp32,
      rounded to ``dtype``, and for the kernel that is its transpose. Stored is W, (out, in), as in
      bitsandbytes and Hugging Face files, so that codes move between them as they are.
    * Blocks run over W in row-major order. If they end with the rows (K a multiple of ``block``),
      (rows, columns) is (N, K); if not, it is (1, N*K).
    * ``codes`` is uint8 [*lead, rows, ceil(columns/2)], element 2j in the high nibble of byte j; in
      another ``layout`` than bitsandbytes' the nibbles of each row are permuted, see ``layouts``.
    * ``codes`` of 8 bits (int8) are one to a byte instead: uint8 [*lead, rows, columns].
    * ``scales`` is f32 [*lead, rows, ceil(columns/block)]; with ``nested`` it is uint8, the codes
      of scales. Second-level groups run over the scales of one matrix.
    * ``zeros``, where ``spec.zeros`` says so, is int16 of the shape of ``scales``: it is taken off
      the codebook's value before that is scaled.
    * ``order``, where ``spec.ordered`` says so, is int32 [*lead, K]: column i of what is stored is
      column ``order[i]`` of W. Blocks then end with the rows.
    * Every array leaf starts with the same lead axes. Leaves may be ``ShapeDtypeStruct``.
    """

    codes: jax.Array
    scales: jax.Array
    nested: NestedScales | None
    spec: Storage = flax.struct.field(pytree_node=False)
    matrix_shape: tuple[int, int] = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    layout: str = flax.struct.field(pytree_node=False, default=BITSANDBYTES)
    zeros: jax.Array | None = None
    order: jax.Array | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes before the matrix: layers, experts."""
        return tuple(self.codes.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """[*lead, K, N], the shape of the kernel it stands for."""
        return (*self.lead, *self.matrix_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that it holds."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        """Stored bits per weight, scales included: 4.127 for blocks of 64, doubly quantized."""
        return 8 * self.nbytes / self.size

    @property
    def scheme(self) -> str:
        """The name of its storage: nf4, fp4, int8, llm.int8 or int."""
        return self.spec.scheme

    @property
    def block(self) -> int:
        """How many elements share a scale."""
        return self.spec.block_in(self.matrix_shape[0])

    @property
    def codebook(self) -> np.ndarray:
        """fp32 [16] or [256]: the value of every code."""
        return self.spec.codebook

    def kernel_operands(
        self,
    ) -> tuple[jax.Array, jax.Array | Affine, jax.Array, Nested | None]:
        """(codes, scales, codebook, nested) as ``jqlora_kernels`` takes them."""
        nested = None
        if self.nested is not None:
            nested = (self.nested.absmax, self.nested.offset, jnp.asarray(dynamic_map()))
        scales = self.scales if self.zeros is None else Affine(self.scales, self.zeros)
        return self.codes, scales, jnp.asarray(self.codebook), nested

    def dequantize_rows(self, dtype: DTypeLike | None = None) -> jax.Array:
        """W [*lead, N, K] in ``dtype`` (default: its own), bit-equal to bitsandbytes' decode."""
        inputs, outputs = self.matrix_shape
        rows = row_count(self.matrix_shape, self.block)
        values = dequantize_blockwise(
            *self.kernel_operands(),
            block=self.block,
            columns=inputs * outputs // rows,
            dtype=self.dtype if dtype is None else dtype,
            layout=self.layout,
        )
        if self.order is not None:
            back = jnp.argsort(self.order, axis=-1)[..., None, :]
            values = jnp.take_along_axis(values, back, axis=-1)
        return values.reshape(*self.lead, outputs, inputs)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The kernel [*lead, K, N] in ``dtype`` (default: its own)."""
        return jnp.swapaxes(self.dequantize_rows(dtype), -1, -2)

    def flat_lead(self) -> "QTensor":
        """The same matrices under one lead axis, [prod(lead)]."""
        depth = len(self.lead)
        count = math.prod(self.lead)

        def flat(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(count, *leaf.shape[depth:])

        return jax.tree.map(flat, self)


def row_count(matrix_shape: tuple[int, int], block: int) -> int:
    """How many rows codes and scales have: N where blocks end with the rows of W, else 1."""
    inputs, outputs = matrix_shape
    return outputs if inputs % block == 0 else 1


def leaf_shapes(matrix_shape: tuple[int, int], spec: Storage) -> dict[str, tuple[int, ...]]:
    """Shapes of ``codes``, ``scales`` and second-level ``absmax`` for one matrix (K, N)."""
    inputs, outputs = matrix_shape
    block = spec.block_in(inputs)
    rows = row_count(matrix_shape, block)
    columns = inputs * outputs // rows
    blocks = -(-columns // block)
    return {
        "codes": (rows, -(-columns // spec.codes_per_byte)),
        "scales": (rows, blocks),
        "absmax": (-(-rows * blocks // GROUP),),
    }


def is_qtensor(leaf: object) -> bool:
    """For ``jax.tree.map(..., is_leaf=is_qtensor)``."""
    return isinstance(leaf, QTensor)
