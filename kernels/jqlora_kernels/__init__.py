"""Block-quantized matrices as raw arrays: quantize, decode, multiply.

One folder an operation: ``reference.py`` is its definition in plain ``jax.numpy``, every other file
a backend that must agree with it, ``api.py`` chooses between them. Arrays and static integers go in
and arrays come out; what a checkpoint or a parameter tree is, this package does not know.

Terms, the same everywhere: a *block* is a run of elements that share one scale; a *group* is a run
of 256 scales that share one second-level scale; a *tile* is what one program of a kernel works on.
"""
