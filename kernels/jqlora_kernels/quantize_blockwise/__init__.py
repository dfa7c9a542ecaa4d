from jqlora_kernels.quantize_blockwise.api import quantize_blockwise, quantize_scales

__all__ = ["quantize_blockwise", "quantize_scales"]
