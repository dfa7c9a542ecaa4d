from jqlora_kernels.quantized_matmul.api import choose, quantized_matmul
from jqlora_kernels.quantized_matmul.sharded import sharded_matmul

__all__ = ["choose", "quantized_matmul", "sharded_matmul"]
