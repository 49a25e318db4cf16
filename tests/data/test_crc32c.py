import numpy as np
import pytest

from bvit_jax.data.prepare.crc32c import crc32c, masked


def _bitwise(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # the examples of RFC 3720, and the check value of the catalogues of CRCs
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_values(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


def test_every_length_equals_the_bitwise_definition() -> None:
    rng = np.random.default_rng(0)
    for length in [*range(60, 140), 255, 1000, 4095, 4097, 10001]:
        data = rng.bytes(length)
        assert crc32c(data) == _bitwise(data), length
        assert crc32c(bytes(length)) == _bitwise(bytes(length)), length


def test_mask() -> None:
    assert masked(0) == 0xA282EAD8
    assert (
        masked(crc32c(bytes(range(8))))
        == (((_bitwise(bytes(range(8))) >> 15) | (_bitwise(bytes(range(8))) << 17)) + 0xA282EAD8) % 2**32
    )
