"""The table of storage schemes: a row has a name, the spec that asks for it, and its codebook.

Linear integers serve 8-bit weights rather than bitsandbytes' dynamic map, the default of its
``quantize_blockwise``: on normally distributed weights their relative error is a third smaller
(0.0059 against 0.0095 in blocks of 64), since the dynamic map spends its codes near zero. That map
is for optimizer states, whose magnitudes span decades.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jqlora.errors import ConfigError
from jqlora.quant.codebooks import fp4_codebook, linear_map, nf4_codebook
from jqlora.quant.spec import FP4, INT8, NF4, BlockQuant
from jqlora_kernels.packing import codes_per_byte


@dataclass(frozen=True)
class Scheme:
    """``codebook()`` is fp32 [16] or [256]: the value of every code."""

    name: str
    spec: type[BlockQuant]
    codebook: Callable[[], np.ndarray]

    @property
    def codes_per_byte(self) -> int:
        return codes_per_byte(self.codebook())


SCHEMES = {
    row.name: row
    for row in (
        Scheme("nf4", NF4, nf4_codebook),
        Scheme("fp4", FP4, fp4_codebook),
        Scheme("int8", INT8, linear_map),
    )
}


def scheme_of(spec: BlockQuant) -> Scheme:
    """The row that a spec asks for; ``ConfigError`` for anything that is no such spec."""
    for row in SCHEMES.values():
        if type(spec) is row.spec:
            return row
    kinds = ", ".join(row.spec.__name__ for row in SCHEMES.values())
    raise ConfigError(f"cannot quantize to {spec!r}: expected an instance of {kinds}")
