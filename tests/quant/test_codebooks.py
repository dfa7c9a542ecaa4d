"""The tables, derived, against their definitions and against bitsandbytes' own."""

import numpy as np
import pytest

from jqlora.quant.codebooks import dynamic_map, fp4_codebook, levels, linear_map, nf4_codebook


def test_nf4_ascends_from_minus_one_to_one_through_an_exact_zero():
    table = nf4_codebook()
    assert table.dtype == np.float32
    assert table.shape == (16,)
    assert (np.diff(table) > 0).all()
    assert table[0] == -1
    assert table[7] == 0
    assert table[15] == 1


def test_fp4_has_a_sign_bit_and_eight_magnitudes():
    table = fp4_codebook()
    np.testing.assert_array_equal(table[8:], -table[:8])
    assert table[3] == 1
    np.testing.assert_allclose(table[:8] * 12, [0, 0.0625, 8, 12, 4, 6, 2, 3], rtol=1e-6)


def test_dynamic_map_has_a_decade_for_every_exponent():
    table = dynamic_map()
    assert table.shape == (256,)
    assert (np.diff(table) > 0).all()
    assert table[127] == 0
    assert table[255] == 1
    np.testing.assert_array_equal(table[:127], -table[254:127:-1])
    for exponent in range(7):
        top = 10.0 ** (exponent - 6)
        assert ((table > 0.1 * top) & (table < top)).sum() == 2**exponent


def test_linear_map_has_equal_steps_and_an_exact_zero():
    table = linear_map()
    assert table.shape == (256,)
    assert (np.diff(table) > 0).all()
    assert table[127] == 0
    np.testing.assert_allclose(np.delete(table, 127) * 127, np.arange(-127, 128), atol=1e-5)


@pytest.mark.parametrize("table", [nf4_codebook, fp4_codebook, linear_map])
def test_levels_name_a_code_for_every_distinct_value(table):
    values, codes = levels(table())
    np.testing.assert_array_equal(table()[codes], values)
    assert set(values) == set(table())
    assert codes[np.searchsorted(values, 0)] in (0, 7, 127)  # positive zero in each


def test_tables_are_shared_and_therefore_read_only():
    assert nf4_codebook() is nf4_codebook()
    with pytest.raises(ValueError, match="read-only"):
        nf4_codebook()[0] = 0


@pytest.mark.parity
def test_tables_equal_those_of_bitsandbytes_bit_for_bit():
    functional = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(nf4_codebook(), functional.get_4bit_type("nf4", "cpu").numpy())
    np.testing.assert_array_equal(fp4_codebook(), functional.get_4bit_type("fp4", "cpu").numpy())
    np.testing.assert_array_equal(dynamic_map(), functional.create_dynamic_map().numpy())
    np.testing.assert_array_equal(linear_map(), functional.create_linear_map().numpy())
