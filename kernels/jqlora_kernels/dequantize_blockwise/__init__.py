from jqlora_kernels.dequantize_blockwise.api import dequantize_blockwise

__all__ = ["dequantize_blockwise"]
