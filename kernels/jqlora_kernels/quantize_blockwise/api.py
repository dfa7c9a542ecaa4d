"""Quantization has one backend: it runs once a weight, and XLA already does it at memory speed."""

from jqlora_kernels.quantize_blockwise.reference import quantize_blockwise, quantize_scales

__all__ = ["quantize_blockwise", "quantize_scales"]
