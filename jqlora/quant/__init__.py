"""Block-quantized storage: NF4 and FP4, with bitsandbytes' own bytes."""

from jqlora.quant.codebooks import dynamic_map, fp4_codebook, nf4_codebook
from jqlora.quant.matmul import quantized_matmul
from jqlora.quant.params import Footprint, footprint, is_quantized_path, quantize_params
from jqlora.quant.qtensor import NestedScales, QTensor, is_qtensor, leaf_shapes
from jqlora.quant.quantize import empty, quantize, quantize_rows
from jqlora.quant.spec import FP4, NF4, BlockQuant

__all__ = [
    "FP4",
    "NF4",
    "BlockQuant",
    "Footprint",
    "NestedScales",
    "QTensor",
    "dynamic_map",
    "empty",
    "footprint",
    "fp4_codebook",
    "is_qtensor",
    "is_quantized_path",
    "leaf_shapes",
    "nf4_codebook",
    "quantize",
    "quantize_params",
    "quantize_rows",
    "quantized_matmul",
]
