"""The table of storage schemes: a row has a name, the spec that asks for it, and its codebook."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jqlora.errors import ConfigError
from jqlora.quant.codebooks import fp4_codebook, nf4_codebook
from jqlora.quant.spec import FP4, NF4, BlockQuant


@dataclass(frozen=True)
class Scheme:
    """``codebook()`` is fp32 [16]: the value of every code."""

    name: str
    spec: type[BlockQuant]
    codebook: Callable[[], np.ndarray]


SCHEMES = {
    row.name: row for row in (Scheme("nf4", NF4, nf4_codebook), Scheme("fp4", FP4, fp4_codebook))
}


def scheme_of(spec: BlockQuant) -> Scheme:
    """The row that a spec asks for; ``ConfigError`` for anything that is no such spec."""
    for row in SCHEMES.values():
        if type(spec) is row.spec:
            return row
    kinds = ", ".join(row.spec.__name__ for row in SCHEMES.values())
    raise ConfigError(f"cannot quantize to {spec!r}: expected an instance of {kinds}")
