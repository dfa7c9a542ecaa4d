from jqlora_kernels.quantized_matmul.api import quantized_matmul

__all__ = ["quantized_matmul"]
