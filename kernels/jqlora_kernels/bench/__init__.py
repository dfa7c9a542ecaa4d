"""Measurements of every kernel beside its baseline: ``python -m jqlora_kernels.bench -h``."""
