"""Small integers packed into 32-bit words, as GPTQ's and AWQ's files hold them.

Words are little endian and filled from their lowest bits, so their bytes are the codes in order:
of 4 bits the first of a byte is its low nibble.
"""

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours AWQ puts into each nibble of a word, from the lowest on."""


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n] to codes uint8 [..., 32 n / bits]; ``bits`` 4 or 8."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of ``unpack_words``."""
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(codes).view(np.int32)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """int32 [..., n] in AWQ's order to codes uint8 [..., 8n]."""
    nibbles = unpack_words(words, 4).reshape(*words.shape, 8)
    return nibbles[..., np.argsort(AWQ_ORDER)].reshape(*words.shape[:-1], -1)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """The inverse of ``unpack_awq``."""
    groups = codes.reshape(*codes.shape[:-1], -1, 8)
    return pack_words(groups[..., list(AWQ_ORDER)].reshape(codes.shape), 4)


def pairs(codes: np.ndarray) -> np.ndarray:
    """Codes uint8 [..., 2n] of 4 bits as ``QTensor`` has them: the first in the high nibble."""
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def apart(data: np.ndarray) -> np.ndarray:
    """The inverse of ``pairs``."""
    return np.stack([data >> 4, data & 15], axis=-1).reshape(*data.shape[:-1], -1)
