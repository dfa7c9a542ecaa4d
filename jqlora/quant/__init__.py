"""Block-quantized storage: NF4, FP4 and INT8, with bitsandbytes' own codes."""

from jqlora.quant.codebooks import dynamic_map, fp4_codebook, linear_map, nf4_codebook
from jqlora.quant.layout import params_with_layout, with_layout
from jqlora.quant.matmul import choose_backends, quantized_matmul
from jqlora.quant.params import Footprint, footprint, is_quantized_path, quantize_params
from jqlora.quant.qtensor import NestedScales, QTensor, is_qtensor, leaf_shapes
from jqlora.quant.quantize import empty, quantize, quantize_rows
from jqlora.quant.sharding import split_inputs, split_outputs
from jqlora.quant.spec import FP4, INT8, NF4, BlockQuant, GroupInt, RowInt8, Storage

__all__ = [
    "FP4",
    "INT8",
    "NF4",
    "BlockQuant",
    "Footprint",
    "GroupInt",
    "NestedScales",
    "QTensor",
    "RowInt8",
    "Storage",
    "choose_backends",
    "dynamic_map",
    "empty",
    "footprint",
    "fp4_codebook",
    "is_qtensor",
    "is_quantized_path",
    "leaf_shapes",
    "linear_map",
    "nf4_codebook",
    "params_with_layout",
    "quantize",
    "quantize_params",
    "quantize_rows",
    "quantized_matmul",
    "split_inputs",
    "split_outputs",
    "with_layout",
]
