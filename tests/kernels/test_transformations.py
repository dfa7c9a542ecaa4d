"""The public operations under vmap: values of the loop, without copies of codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.quant import INT8, NF4, quantize
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.quantized_matmul import quantized_matmul
from tests.draws import draws

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
BACKENDS = ("reference", "triton_interpret")
SPEC = NF4(double_quant=True)


def stack(*lead, spec=SPEC):
    kernel = draws(0)((*lead, 128, 24), 1 / 10)
    return quantize(kernel, spec).kernel_operands()


def element(operands, *at):
    codes, scales, codebook, nested = operands
    nested = nested and (nested[0][at], nested[1][at], nested[2])
    return codes[at], scales[at], codebook, nested


def rows(*shape):
    return draws(1)((*shape, 128))


def value_and_gradient(multiply):
    """``multiply`` and the gradient of a scalar of it, both of (x, *others)."""

    def both(x, *others):
        y, pull = jax.vjp(lambda x: multiply(x, *others), x)
        return y, pull(jnp.cos(y))[0]

    return jax.jit(both)


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.fixture(params=BACKENDS)
def multiply(request):
    product = functools.partial(quantized_matmul, block=64, features=24, backend=request.param)
    return value_and_gradient(product)


def in_axes(operands, axis=0):
    """The axes of ``vmap`` for operands whose tables are shared."""
    return (axis, axis, None, None if operands[3] is None else (axis, axis, None))


def test_a_batch_of_rows_is_folded_into_more_rows(multiply):
    operands, x = stack(), rows(3, 2)
    batched = jax.jit(jax.vmap(lambda x: multiply(x, *operands)))
    expected = [multiply(x[i], *operands) for i in range(3)]
    assert_all_close(batched(x), [jnp.stack(leaves) for leaves in zip(*expected, strict=True)])
    text = str(jax.make_jaxpr(jax.vmap(lambda x: multiply(x, *operands)[0]))(x))
    assert "length=3" not in text


@pytest.mark.parametrize("spec", [SPEC, INT8()], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_of_matrices_gives_what_the_loop_gives(multiply, spec, shared):
    if spec == INT8():
        multiply = value_and_gradient(functools.partial(quantized_matmul, block=64, features=24))
    operands, x = stack(3, spec=spec), rows(2) if shared else rows(3, 2)
    axes = (None if shared else 0, *in_axes(operands))
    actual = jax.jit(jax.vmap(multiply, in_axes=axes))(x, *operands)
    expected = [multiply(x if shared else x[i], *element(operands, i)) for i in range(3)]
    assert_all_close(actual, [jnp.stack(leaves) for leaves in zip(*expected, strict=True)])


@pytest.mark.parametrize("batched_index", [False, True])
def test_a_batch_of_stacks_is_one_longer_stack(multiply, batched_index):
    operands, x = stack(3, 2), rows(3, 2)
    index = jnp.array([1, 0, 1]) if batched_index else jnp.int32(1)
    axes = (0, *in_axes(operands), 0 if batched_index else None)
    actual = jax.jit(jax.vmap(multiply, in_axes=axes))(x, *operands, index)
    layers = [int(i) for i in jnp.broadcast_to(index, (3,))]
    expected = [multiply(x[i], *element(operands, i, layers[i])) for i in range(3)]
    assert_all_close(actual, [jnp.stack(leaves) for leaves in zip(*expected, strict=True)])


def test_a_batch_of_indices_into_one_stack_gathers_no_codes(multiply):
    operands, x, index = stack(3), rows(4, 2), jnp.array([2, 0, 1, 2])
    batched = jax.vmap(lambda x, i: multiply(x, *operands, i))
    expected = [multiply(x[i], *element(operands, int(index[i]))) for i in range(4)]
    leaves = [jnp.stack(leaves) for leaves in zip(*expected, strict=True)]
    assert_all_close(jax.jit(batched)(x, index), leaves)
    shapes = str(jax.make_jaxpr(batched)(x, index))
    assert "u8[4,24,64]" not in shapes


def test_nested_batches_scans_and_rematerialization_compose(multiply):
    operands, x = stack(2, 3), rows(2, 3, 4)
    back = draws(2)((24, 128), 1 / 5)

    @jax.checkpoint
    def layer(x, operands, i):
        return jnp.tanh(multiply(x, *operands, i)[0] @ back)

    @jax.jit
    def run(x, *operands):
        return jax.lax.scan(lambda x, i: (layer(x, operands, i), None), x, jnp.arange(3))[0][..., 0]

    over_x = jax.vmap(run, in_axes=(0, *(None,) * 4))
    total = jax.vmap(over_x, in_axes=(0, *in_axes(operands)))
    actual = jax.jit(total)(x, *operands)
    expected = [[run(x[i, j], *element(operands, i)) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(actual, np.asarray(expected), atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_a_batch_decodes_a_stack(backend):
    operands = stack(3)
    decode = functools.partial(
        dequantize_blockwise, block=64, columns=128, dtype="float32", backend=backend
    )
    axes = in_axes(operands)
    expected = decode(*operands)
    np.testing.assert_array_equal(jax.vmap(decode, in_axes=axes)(*operands), expected)
    by_index = jax.vmap(lambda i: decode(*operands, i))(jnp.array([2, 0]))
    np.testing.assert_array_equal(by_index, expected[jnp.array([2, 0])])


def test_tables_cannot_differ_along_a_batch():
    codes, scales, codebook, nested = stack(2)
    with pytest.raises(ValueError, match="codebook"):
        jax.vmap(
            lambda book, x: quantized_matmul(
                x, codes[0], scales[0], book, (nested[0][0], nested[1][0], nested[2]),
                block=64, features=24,
            )
        )(jnp.stack([codebook] * 2), rows(2, 2))  # fmt: skip
