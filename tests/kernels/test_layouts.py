"""Layouts are permutations of nibbles within rows, with an exact inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora_kernels.layouts import BITSANDBYTES, HOPPER, LAYOUTS, check_layout, repack


@pytest.fixture
def codes():
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 5, 192), np.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_8_bits_have_every_layout_too(layout, codes):
    codes = codes[..., :128]
    there = np.asarray(repack(codes, BITSANDBYTES, layout, 1))
    np.testing.assert_array_equal(repack(jnp.asarray(there), layout, BITSANDBYTES, 1), codes)
    for byte in range(codes.shape[-1] if layout == HOPPER else 0):
        sixteen, inside = divmod(byte, 16)
        lane, i = divmod(inside, 4)
        element = 16 * sixteen + 2 * lane + i % 2 + 8 * (i // 2)
        np.testing.assert_array_equal(there[..., byte], codes[..., element])


def elements(codes):
    """The nibbles of bitsandbytes' codes in the order of the elements."""
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(*codes.shape[:-1], -1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_an_exact_inverse(layout, codes):
    there = repack(codes, BITSANDBYTES, layout)
    assert there.shape == codes.shape
    assert there.dtype == codes.dtype
    np.testing.assert_array_equal(repack(there, layout, BITSANDBYTES), codes)
    np.testing.assert_array_equal(
        repack(repack(codes, layout, BITSANDBYTES), BITSANDBYTES, layout), codes
    )


def test_the_nibbles_of_the_hopper_layout_lie_where_its_description_says(codes):
    packed, plain = np.asarray(repack(codes, BITSANDBYTES, HOPPER)), elements(np.asarray(codes))
    for byte in range(packed.shape[-1]):
        span, place = divmod(byte, 64)
        sixteen, inside = divmod(place, 16)
        lane, i = divmod(inside, 4)
        element = 128 * span + 16 * sixteen + 2 * lane + i % 2 + 8 * (i // 2)
        np.testing.assert_array_equal(packed[..., byte] & 15, plain[..., element])
        np.testing.assert_array_equal(packed[..., byte] >> 4, plain[..., element + 64])


def test_repacking_works_on_shapes_alone():
    shape = jax.ShapeDtypeStruct((2, 4, 64), jnp.uint8)
    assert jax.eval_shape(lambda c: repack(c, BITSANDBYTES, HOPPER), shape) == shape


@pytest.mark.parametrize(
    ("layout", "columns", "said"), [("marlin", 128, "marlin"), (HOPPER, 64, "64")]
)
def test_what_no_row_can_have_is_refused(layout, columns, said):
    with pytest.raises(ValueError, match=said):
        check_layout(layout, columns)
