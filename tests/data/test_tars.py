import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from bvit_jax.data.prepare.cifar import ARCHIVE, cifar100_source
from bvit_jax.data.prepare.tars import list_members
from bvit_jax.errors import UserError

LONG = b"100 comment=" + b"x" * 87 + b"\n"  # a record of a pax header


def _header(kind: bytes, size: int = 0, name: str = "x") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def _pax(content: bytes) -> bytes:
    return _header(tarfile.XHDTYPE, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


SPARSE = bytearray(_header(tarfile.GNUTYPE_SPARSE))
SPARSE[482] = 1  # a block of a map follows
SPARSE[148:156] = b"%06o\0 " % (sum(SPARSE[:148]) + 256 + sum(SPARSE[156:]))
HARMFUL = {
    "long name": _header(tarfile.GNUTYPE_LONGNAME, 1 << 33),
    "long link": _header(tarfile.GNUTYPE_LONGLINK, 1 << 33),
    "pax header": _header(tarfile.XHDTYPE, 1 << 33),
    "negative size": _header(tarfile.XHDTYPE, -(1 << 33)),
    "many records": _pax(LONG * 300_000),
    "header of headers": _pax(LONG) * 2000,
    "sparse map": bytes(SPARSE) + (b"7" * 504 + b"\1" + bytes(7)) * 60_000,
    "file before itself": _header(tarfile.REGTYPE, -1024),
    "sparse map of no numbers": _pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
    + _header(tarfile.REGTYPE, 512)
    + b"no number\n" * 52,
}


@pytest.mark.parametrize("kind", HARMFUL)
@pytest.mark.parametrize("archive", ["tar", "cifar"])
def test_headers_made_to_harm(tmp_path: Path, kind: str, archive: str) -> None:
    whole = HARMFUL[kind] + bytes(1 << 16)
    (tmp_path / ARCHIVE).write_bytes(gzip.compress(whole, 1))
    read = {
        "tar": lambda: list(list_members(io.BytesIO(whole), "x.tar")),
        "cifar": lambda: cifar100_source(tmp_path, tmp_path / "data"),
    }
    tracemalloc.start()
    with pytest.raises(UserError, match=r"damaged or cut off.*; get it again"):
        read[archive]()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_long_names_within_reason(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("d/" * 1000 + "long", "kürzer"):
            tar.addfile(tarfile.TarInfo(name))
    with (tmp_path / "x.tar").open("rb") as file:
        assert [len(member.name) for member in list_members(file, "x.tar")] == [2004, 6]
