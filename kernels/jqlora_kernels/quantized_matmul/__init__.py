"""Products with a block-quantized matrix, and why none takes the low-rank path of LoRA with it.

One kernel for ``y = x W.T + s (x A) B`` was weighed and left out. By counting, for K = N = 4096,
rank R = 16, bf16, 3.35 TB/s and 700 TFLOP/s (estimates, not measurements):

* Few rows. The base product reads 8.7 MB of codes, 2.6 µs; A and B are 0.26 MB, 3 % of that. What a
  fused kernel could save are launches, two of three. But every program needs all of ``x A`` before
  its own columns of B: computed again by each, A is read once a program, 128 KiB times 1024
  programs of four rows (``triton_vector``) or times 128 of 32 (``triton_fused``), 134 or 17 MB of
  traffic beside the 8.7 MB that the kernel exists to read. Computed beforehand it is a launch
  again, and one of three is what is saved.
* Many rows. At 2,048 the low-rank path is 0.8 % of the operations, R (K + N) / (K N). Adding it
  rereads and rewrites ``y``, 33 MB or 10 µs beside some 100 µs of GEMM. There the base product is
  the vendor's GEMM on a decoded matrix, into which nothing can be fused but by appending B to the
  matrix and ``x A`` to ``x``, which copies as many bytes of ``x`` as it saves of ``y``.
* In training ``x A`` is a residual of the backward pass, and with dropout the low-rank path has an
  ``x`` of its own: a fused kernel would have to write the one and read the other.

Nor is there room: the fused tiles take up to 128 registers a thread (``aot``) before a second
accumulator. What would change the answer are launches that are measured to cost a decoding step of
a few rows more than the reading of codes does.
"""

from jqlora_kernels.quantized_matmul.api import choose, quantized_matmul

__all__ = ["choose", "quantized_matmul"]
