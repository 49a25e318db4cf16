"""CRC-32C, the checksum in TFRecord files, fast without an extension module.

The checksum is linear over bits: the one of a long message follows from those of its two halves by a
shift (as if zeros were appended to the first) and an exclusive or. So NumPy combines all neighbouring
words of a record at once, then all neighbouring pairs, and so on.
"""

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
MASK_DELTA = 0xA282EAD8
SHORT = 64  # bytes for which NumPy does not pay


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C of ``data``: 0xE3069283 for ``b"123456789"``."""
    if len(data) < SHORT:
        register = 0xFFFFFFFF
        for byte in data:
            register = _byte_table()[(register ^ byte) & 0xFF] ^ (register >> 8)
        return register ^ 0xFFFFFFFF
    # Zeros in front change nothing for a register that starts at 0; one that starts with all bits
    # set is the same as inverting the first four bytes.
    padding = -len(data) % 4
    padded = bytearray(padding) + data
    for position in range(padding, padding + 4):
        padded[position] ^= 0xFF
    words = np.frombuffer(padded, "<u4")
    level = 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, words.dtype), words])
        words = _shift(words[0::2], level) ^ words[1::2]
        level += 1
    return int(_shift(words, 0)[0]) ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """Returns the form in which TFRecord files store a checksum."""
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def _shift(registers: np.ndarray, level: int) -> np.ndarray:
    """Returns the uint32 registers after ``4 * 2**level`` more zero bytes."""
    low, high = _shift_tables(level)
    return low[registers & 0xFFFF] ^ high[registers >> 16]


@functools.cache
def _shift_tables(level: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what becomes of each lower and each upper half of a register."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if level:
        images = _shift(_shift(bits, level - 1), level - 1)
    else:
        table, images = np.array(_byte_table(), np.uint32), bits
        for _ in range(4):
            images = table[images & 0xFF] ^ (images >> 8)
    return _span(images[:16]), _span(images[16:])


def _span(images: np.ndarray) -> np.ndarray:
    """Returns the exclusive or of the images of the set bits, for each number of 16 bits."""
    table = np.zeros(1, np.uint32)
    for image in images:
        table = np.concatenate([table, table ^ image])
    return table


@functools.cache
def _byte_table() -> tuple[int, ...]:
    registers = list(range(256))
    for _ in range(8):
        registers = [(register >> 1) ^ (POLYNOMIAL if register & 1 else 0) for register in registers]
    return tuple(registers)
