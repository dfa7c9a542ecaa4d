from jqlora_kernels.quantized_matmul.api import choose, quantized_matmul

__all__ = ["choose", "quantized_matmul"]
