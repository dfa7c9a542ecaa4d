"""The kernel for Hopper, as far as that can be proven without one.

The interpreter runs the pipeline, the layout, the scales and the products, and finds races; it
cannot run the instructions that look nibbles up, so those are run here by a model of ``prmt``.
Lowering and compiling show that the rest of the device's form is one that exists.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.quant import FP4, INT8, NF4, fp4_codebook, nf4_codebook, quantize, with_layout
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.layouts import HOPPER
from jqlora_kernels.quantized_matmul import quantized_matmul, reference
from tests.draws import draws

mgpu = pytest.importorskip("jax.experimental.mosaic.gpu")
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
mosaic_lookup = pytest.importorskip("jqlora_kernels.mosaic_lookup")
pallas_mosaic = pytest.importorskip("jqlora_kernels.quantized_matmul.pallas_mosaic")

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="JAX before 0.11 cannot interpret Mosaic"
)
BUDGET = {"bfloat16": 2**-7, "float16": 2**-10}
CASES = [
    (NF4(double_quant=True), "bfloat16", (20, 256, 128)),
    (FP4(block=128), "float16", (20, 128, 256)),
    (NF4(block=32, double_quant=True), "bfloat16", (3, 128, 128)),
    (INT8(double_quant=True), "bfloat16", (20, 256, 128)),
    (INT8(block=32), "float16", (3, 128, 128)),
]
DECODED = [
    (NF4(double_quant=True), "bfloat16"),
    (FP4(block=32), "float16"),
    (INT8(double_quant=True), "float32"),
]


def prmt(a, b, selectors):
    """PTX's ``prmt.b32``: four bytes picked out of eight, (b, a) from the top."""
    octets = np.stack([x >> shift & 255 for x in (a, b) for shift in (0, 8, 16, 24)])
    picked = [octets[selectors >> 4 * i & 7, np.arange(octets.shape[1])] for i in range(4)]
    assert not (selectors & 0x8888 & 0xFFFF).any(), "a selector with its sign bit copies the sign"
    return sum(byte << np.uint32(8 * i) for i, byte in enumerate(picked)).astype(np.uint32)


@pytest.mark.parametrize("codebook", [nf4_codebook(), fp4_codebook()], ids=["nf4", "fp4"])
def test_the_instructions_find_the_exact_value_of_every_nibble(codebook):
    rng = np.random.default_rng(0)
    octets = np.arange(256, dtype=np.uint8)
    codes = np.stack([*rng.integers(0, 256, (3, 256), np.uint8), octets], axis=-1)
    codes = np.concatenate([codes, np.roll(codes, 1, axis=-1)])
    table = np.asarray(mosaic_lookup.table_words(jnp.asarray(codebook))).view(np.uint32)
    words = [np.full(len(codes), word) for word in table]

    def constant(value):
        return np.full(len(codes), value, np.uint32)

    found = mosaic_lookup.look_up_nibbles(codes.view(np.uint32)[:, 0], words, prmt, constant)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), 8)
    expected = codebook[nibbles].view(np.uint32)
    np.testing.assert_array_equal(np.stack(found, axis=-1), expected)


def test_a_table_of_16_bit_entries_gives_pairs_ready_for_the_operand():
    octets = np.arange(256, dtype=np.uint8)
    codes = np.stack([np.roll(octets, i) for i in (0, 7, 100, 201)], axis=-1)
    codebook = jnp.asarray(nf4_codebook()).astype(jnp.bfloat16)
    table = np.asarray(mosaic_lookup.table_words(codebook)).view(np.uint32)
    words = [np.full(len(codes), word) for word in table]

    def constant(value):
        return np.full(len(codes), value, np.uint32)

    pairs = mosaic_lookup.look_up_nibbles(codes.view(np.uint32)[:, 0], words, prmt, constant)
    entries = np.asarray(codebook).view(np.uint16)
    low, high = entries[codes & 15], entries[codes >> 4]
    for pair, source, first in zip(pairs, (low, high, low, high), (0, 0, 2, 2), strict=True):
        np.testing.assert_array_equal(pair & 0xFFFF, source[:, first])
        np.testing.assert_array_equal(pair >> 16, source[:, first + 1])


def test_the_registers_of_operands_are_where_the_layout_of_codes_supposes():
    # a lane holds four neighbouring bytes of 16, and two neighbouring 16-bit elements of 8
    assert mgpu.WGMMA_LAYOUT_8BIT.tiling.tiles == ((64, 16), (16, 16), (8, 16), (4,))
    assert mgpu.WGMMA_LAYOUT.tiling.tiles == ((64, 8), (16, 8), (8, 8), (2,))
    for layout in (mgpu.WGMMA_LAYOUT, mgpu.WGMMA_LAYOUT_8BIT):
        assert layout.warp_dims == (-7,)
        assert layout.lane_dims == (-3, -2)
        assert layout.vector_dim == -1


def stack(spec, inputs, outputs):
    """(operands in bitsandbytes' layout, the same in the kernel's) of two random matrices."""
    q = quantize(draws(inputs)((2, inputs, outputs), 1 / 10), spec)
    return q.kernel_operands(), with_layout(q, HOPPER).kernel_operands()


@needs_interpreter
@pytest.mark.parametrize(("spec", "dtype", "shape"), CASES, ids=str)
def test_products_and_gradients_agree_with_the_definition_and_do_not_race(spec, dtype, shape):
    rows, inputs, outputs = shape
    plain, packed = stack(spec, inputs, outputs)
    x = draws(1)((rows, inputs), dtype=dtype)
    multiply = functools.partial(quantized_matmul, block=spec.block, features=outputs)

    def both(operands, **options):
        y, pull = jax.vjp(lambda x: multiply(x, *operands, jnp.int32(1), **options), x)
        return y, *pull(jnp.cos(y))

    expected = jax.jit(functools.partial(both, backend="reference"))(plain)
    emulated = functools.partial(both, layout=HOPPER, backend="mosaic_interpret")
    actual = jax.jit(emulated)(packed)
    for e, a in zip(expected, actual, strict=True):
        assert a.dtype == e.dtype
        e, a = np.asarray(e, np.float32), np.asarray(a, np.float32)
        assert np.abs(a - e).max() <= BUDGET[dtype] * np.abs(e).max()


@needs_interpreter
@pytest.mark.parametrize(("spec", "dtype"), DECODED, ids=str)
def test_decoding_agrees_bit_for_bit_with_the_definition(spec, dtype):
    plain, packed = stack(spec, 256, 64)
    decode = functools.partial(dequantize_blockwise, block=spec.block, columns=256, dtype=dtype)
    actual = decode(*packed, layout=HOPPER, backend="mosaic_interpret")
    assert actual.dtype == dtype
    expected = decode(*plain, backend="reference")
    np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(expected, np.float32))


@needs_interpreter
def test_many_rows_are_multiplied_by_the_matrix_decoded_once():
    plain, packed = stack(NF4(), 128, 128)
    x = draws(1)((3, 128), dtype=jnp.bfloat16)
    for name in ("quantized_matmul", "transposed"):
        options = {"block": 64, "features": 128}
        made = {"layout": HOPPER, "interpret": True, "fused_rows": 2}
        actual = getattr(pallas_mosaic, name)(x, *packed, jnp.int32(1), **options, **made)
        expected = getattr(reference, name)(x, *plain, jnp.int32(1), **options)
        e, a = np.asarray(expected, np.float32), np.asarray(actual, np.float32)
        assert np.abs(a - e).max() <= BUDGET["bfloat16"] * np.abs(e).max()


@needs_interpreter
def test_the_fast_mode_stays_within_its_budget():
    # A bf16 rounding is off by u = 2^-8 at most, relatively. A weight takes three of them (code,
    # scale, product): 3u + 3u^2 + u^3 < 3.02u. The sum over K adds up those of its terms, and is
    # itself rounded; accumulating in fp32 is smaller by 2^-16 and covered by the same 0.02.
    u, spec, (rows, inputs, outputs) = 2.0**-8, NF4(double_quant=True), (20, 256, 128)
    q = quantize(draws(0)((inputs, outputs), 1 / 10), spec)
    x = draws(1)((rows, inputs), dtype=jnp.bfloat16)
    y = pallas_mosaic.quantized_matmul(
        x,
        *with_layout(q, HOPPER).kernel_operands(),
        block=64,
        features=outputs,
        layout=HOPPER,
        fast=True,
        interpret=True,
    )
    weight, wide = np.asarray(q.dequantize(jnp.float32), np.float64), np.asarray(x, np.float64)
    exact = wide @ weight
    allowed = 3.02 * u * (np.abs(wide) @ np.abs(weight))
    error = np.abs(np.asarray(y, np.float64) - exact)
    assert (error <= allowed + u * (np.abs(exact) + allowed)).all()
    assert error.max() > 0.1 * u * np.abs(exact).mean(), "this is not the fast mode"


LOWERED = [(*case[:2], rows) for case, rows in zip(CASES, (4, 500, 1000, 4, 1000), strict=True)]


@pytest.mark.parametrize(("spec", "dtype", "rows"), LOWERED, ids=str)
def test_the_kernels_lower_and_read_the_layer_where_it_lies(spec, dtype, rows, cuda_text):
    backend = "mosaic_fast" if spec == NF4(double_quant=True) else "mosaic"
    shapes = jax.eval_shape(lambda: stack(spec, 1024, 256)[1])

    def loss(x, operands, index):
        options = {"block": spec.block, "layout": HOPPER, "backend": backend}
        y = quantized_matmul(x, *operands, index, features=256, **options)
        return (y.astype(jnp.float32) ** 2).sum()

    x = jax.ShapeDtypeStruct((rows, 1024), dtype)
    text = cuda_text(jax.grad(loss), x, shapes, jax.ShapeDtypeStruct((), jnp.int32))
    assert text.count("custom_call @mosaic_gpu") == 2
    assert "dynamic_slice" not in text


REFUSED = [
    ({"layout": "bitsandbytes"}, "layout"),
    ({"dtype": "float32"}, "float32"),
    ({"spec": NF4(block=256)}, "block=256"),
    ({"spec": INT8(), "backend": "mosaic_fast"}, "codes of 4 bits"),
    ({"outputs": 192}, "N=192"),
    ({"dtype": "float16", "backend": "mosaic_fast"}, "fast mode"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_it_cannot_serve_it_refuses_with_the_limit(change, said):
    case = {"layout": HOPPER, "dtype": "bfloat16", "spec": NF4(), "outputs": 128}
    case |= {"backend": "mosaic"} | change
    q = quantize(jnp.ones((128, case["outputs"])), case["spec"])
    x = jnp.ones((4, 128), case["dtype"])
    with pytest.raises(NotImplementedError, match=said):
        quantized_matmul(
            x,
            *q.kernel_operands(),
            block=q.block,
            features=case["outputs"],
            layout=case["layout"],
            backend=case["backend"],
        )


def test_rows_that_end_inside_a_span_are_refused():
    q = quantize(jnp.ones((192, 128)), NF4())
    with pytest.raises(NotImplementedError, match="K=192"):
        quantized_matmul(
            jnp.ones((4, 192), jnp.bfloat16),
            *q.kernel_operands(),
            block=64,
            features=128,
            layout=HOPPER,
            backend="mosaic",
        )


def test_no_platform_prefers_what_no_device_has_run():
    from jqlora_kernels.dispatch import ORDER

    names = set(itertools.chain(*ORDER.values()))
    assert not {name for name in names if name.startswith("mosaic")}
