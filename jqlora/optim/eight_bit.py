"""Moments as 8-bit codes: block-wise dynamic quantization of any optimizer's state.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), with the tables
and the sizes of bitsandbytes: blocks of 256 elements share one fp32 scale, signed moments take the
signed dynamic map, moments that are never negative the unsigned one, and small tensors stay as they
are, in fp32. An update decodes the moments, lets the inner optimizer work in fp32, and encodes what
it returns; the update itself is made before anything is rounded.
"""

from collections.abc import Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jqlora.optim.rounding import in_float32
from jqlora.quant.codebooks import dynamic_map
from jqlora.types import PyTree
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.quantize_blockwise import quantize_blockwise

BLOCK = 256
SMALLEST = 4096
NEVER_NEGATIVE = ("nu", "v", "sum_of_squares")
"""What optax calls the moments of squares."""


@flax.struct.dataclass
class EightBit:
    """A moment of n elements: ``table[code] * scale of its block``, blocks over the flat array.

    ``codes`` uint8 has the moment's own shape. ``scales`` f32 is [n / 256], or [1, ceil(n / 256)]
    where the last block is short: then the leading axis cannot be cut into pages along with the
    codes', and says so. ``dtype`` is what it decodes to.
    """

    codes: jax.Array
    scales: jax.Array
    signed: bool = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)

    @classmethod
    def encode(cls, moment: jax.Array, *, signed: bool) -> "EightBit":
        """The nearest codes. Rounds; a moment of zeros stays one."""
        codes, scales = quantize_blockwise(moment.reshape(-1), _table(signed), block=BLOCK)
        if moment.size % BLOCK:
            scales = scales[None]
        return cls(codes.reshape(moment.shape), scales, signed, moment.dtype)

    def decode(self) -> jax.Array:
        """The moment, in its own dtype."""
        count = self.codes.size
        # the reference backend, because XLA fuses it with the moment's update
        values = dequantize_blockwise(
            self.codes.reshape(1, count),
            self.scales.reshape(1, -1),
            _table(self.signed),
            block=BLOCK,
            columns=count,
            dtype=self.dtype,
            backend="reference",
        )
        return values.reshape(self.codes.shape)


def eight_bit(
    inner: optax.GradientTransformation,
    *,
    never_negative: Collection[str] = NEVER_NEGATIVE,
    smallest: int = SMALLEST,
) -> optax.GradientTransformationExtraArgs:
    """``inner`` with every floating leaf of its state of ``smallest`` elements or more in 8 bits.

    Sizes are those of whole leaves: a stack of layers counts as one. Leaves below a field or key of
    the state that is named in ``never_negative`` take the unsigned map.

    >>> tx = optax.chain(eight_bit(optax.scale_by_adam()), optax.scale(-1e-3))  # doctest: +SKIP
    """
    inner = in_float32(inner)

    def encode(path: Any, leaf: Any) -> Any:
        if leaf.size < smallest or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        names = {getattr(key, "name", getattr(key, "key", None)) for key in path}
        return EightBit.encode(leaf, signed=names.isdisjoint(never_negative))

    def init(params: Any) -> PyTree:
        return jax.tree_util.tree_map_with_path(encode, inner.init(params))

    def update(updates: Any, state: PyTree, params: Any = None, **extra: Any) -> tuple[Any, PyTree]:
        whole = jax.tree.map(
            lambda leaf: leaf.decode() if _is_stored(leaf) else leaf, state, is_leaf=_is_stored
        )
        updates, whole = inner.update(updates, whole, params, **extra)

        def as_before(old: Any, new: Any) -> Any:
            return EightBit.encode(new, signed=old.signed) if _is_stored(old) else new

        return updates, jax.tree.map(as_before, state, whole, is_leaf=_is_stored)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_stored(node: Any) -> bool:
    return isinstance(node, EightBit)


def _table(signed: bool) -> jax.Array:
    return jnp.asarray(dynamic_map(signed=signed))
