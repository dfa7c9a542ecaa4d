"""How the codes of a matrix lie in memory: bitsandbytes' order, and permutations of it.

A layout moves codes within rows and changes no shape: they stay uint8 [*lead, N, K/2], or of 8 bits
[*lead, N, K]; scales and second-level scales stay as they are. What a layout is for is told beside
its name; every one has an exact inverse here, so that files never see any but bitsandbytes' own.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")

BITSANDBYTES = "bitsandbytes"
"""Byte j of a row holds elements 2j (high nibble) and 2j + 1 (low); of 8 bits, element j."""

HOPPER = "hopper"
"""For wgmma, whose operands a warp group holds in registers.

A row is cut into spans of 128 elements. Of 4 bits, 64 bytes each: low nibbles are elements 0 ... 63
of the span, high nibbles 64 ... 127, so that one byte feeds two instructions a tile of 64 apart.
Within 16 of either (and within 16 codes of 8 bits), byte 4l + i holds element
2l + (i % 2) + 8 (i // 2): the four that lane l of a quad owns in the 16-bit operand (PTX ISA,
"wgmma.mma_async", matrix fragments of A) are the four bytes that it loads as one word.
"""

LAYOUTS = (BITSANDBYTES, HOPPER)
SPAN = 128


def check_layout(layout: str, columns: int) -> None:
    """``ValueError`` for an unknown layout, and one that ``columns`` elements a row cannot have."""
    if layout not in LAYOUTS:
        raise ValueError(f"{layout=} is none of {', '.join(LAYOUTS)}")
    if layout == HOPPER and columns % SPAN:
        raise ValueError(f"{layout=} needs rows of a multiple of {SPAN} elements, not {columns}")


def repack(codes: jax.Array, source: str, target: str, parts: int = 2) -> jax.Array:
    """Codes uint8 [..., K / parts], ``parts`` to a byte, laid out as ``source``, laid out as
    ``target``.

    Raises what ``check_layout`` raises.
    """
    for layout in (source, target):
        check_layout(layout, parts * codes.shape[-1])
    if source == target:
        return codes
    if parts == 1:
        return swapped(codes, 2, 4) if target == HOPPER else swapped(codes, 4, 2)
    return to_hopper(codes) if target == HOPPER else from_hopper(codes)


def swapped(codes: jax.Array, outer: int, inner: int) -> jax.Array:
    """Bytes [..., n], pairs of which are numbered by axes of ``outer`` and ``inner``, with these
    two exchanged: (2, 4) brings the pairs of a lane together, (4, 2) apart again."""
    pairs = codes.reshape(*codes.shape[:-1], -1, outer, inner, 2)
    return jnp.swapaxes(pairs, -3, -2).reshape(codes.shape)


def to_hopper(codes: jax.Array) -> jax.Array:
    """bitsandbytes' codes of 4 bits, uint8 [..., K/2], in the layout ``HOPPER``."""
    nibbles = jnp.stack([codes >> 4, codes & 15], axis=-1)
    spans = nibbles.reshape(*codes.shape[:-1], -1, 2, SPAN // 2)
    low, high = (swapped(spans[..., half, :], 2, 4) for half in range(2))
    return (low | (high << 4)).reshape(codes.shape)


def from_hopper(codes: jax.Array) -> jax.Array:
    """The inverse of ``to_hopper``."""
    spans = codes.reshape(*codes.shape[:-1], -1, SPAN // 2)
    nibbles = jnp.stack([swapped(half, 4, 2) for half in (spans & 15, spans >> 4)], axis=-2)
    pairs = nibbles.reshape(*codes.shape, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def only_bitsandbytes(kernel: Callable[..., Result], layout: str) -> Callable[..., Result]:
    """The backend ``kernel``, or one that refuses ``layout`` because it cannot read it."""
    if layout == BITSANDBYTES:
        return kernel

    def refuse(*_: object, **__: object) -> Result:
        raise NotImplementedError(f"{layout=}: the kernel reads {BITSANDBYTES!r} alone")

    return refuse
