"""The storages that matrices can be quantized to, by the names that configs give them.

Linear integers serve 8-bit weights rather than bitsandbytes' dynamic map, the default of its
``quantize_blockwise``: on normally distributed weights their relative error is a third smaller
(0.0059 against 0.0095 in blocks of 64), since the dynamic map spends its codes near zero. That map
is for optimizer states, whose magnitudes span decades.
"""

from jqlora.errors import ConfigError
from jqlora.quant.spec import FP4, INT8, NF4, BlockQuant, RowInt8, Storage

SCHEMES: dict[str, type[BlockQuant]] = {row.scheme: row for row in (NF4, FP4, INT8)}


def check_quantizable(spec: Storage) -> None:
    """``ConfigError`` for what no matrix is quantized to: a calibrated storage, or no spec."""
    if isinstance(spec, RowInt8) or type(spec) in SCHEMES.values():
        return
    kinds = ", ".join(row.__name__ for row in SCHEMES.values())
    raise ConfigError(f"cannot quantize to {spec!r}: expected an instance of {kinds}")
