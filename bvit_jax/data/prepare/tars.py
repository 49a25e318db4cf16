"""Reads uncompressed tar files, also nested ones, by the offsets of their members."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from bvit_jax.data.splits import one_line
from bvit_jax.errors import UserError

BLOCK = tarfile.BLOCKSIZE
MAX_HEADERS = 1 << 16  # bytes before one member: long names, times and the like


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its name, and offset and size of its bytes in the (outer) tar file."""

    name: str
    offset: int
    size: int


class _Bounded:
    """A file for tarfile, which reads at once whatever size a header claims, and any number of headers."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file
        self.left = MAX_HEADERS

    def read(self, size: int) -> bytes:
        """Returns the next bytes; raises `tarfile.TarError` beyond `MAX_HEADERS`."""
        if not 0 <= size <= self.left:
            raise tarfile.TarError(f"a file's headers have more than {MAX_HEADERS:,} bytes")
        self.left -= size
        return self._file.read(size)


def list_members(
    file: io.BufferedIOBase, name: str, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Yields the files of a tar, reading headers only.

    Args:
      file: open for reading; the caller may move its position between two members.
      name: of the tar, for messages.
      start: byte of ``file`` at which the tar begins.
      end: byte of ``file`` at which it ends; None for the end of ``file``.

    Raises:
      UserError: it is no tar, is damaged or truncated, or holds anything but files and directories.
    """
    end = file.seek(0, 2) if end is None else end
    file.seek(start)
    last, bounded = start, _Bounded(file)
    try:
        with tarfile.open(fileobj=cast(Any, bounded), mode="r:") as archive:
            while (member := archive.next()) is not None:
                bounded.left = MAX_HEADERS
                if member.size < 0:
                    raise tarfile.TarError(f"{member.name} has {member.size:,} bytes")
                last = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if last > end:
                    raise UserError(
                        f"{name} is cut off in the middle of {member.name}, at byte {end:,}; get it again"
                    )
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{name} holds {member.name}, which is not a regular file; get it again")
                yield Member(str(PurePosixPath(member.name)), member.offset_data, member.size)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{name} is damaged or cut off: {one_line(error)}; get it again") from error
    # tarfile takes a damaged header for the end of the tar; a real end is a block of zeros.
    file.seek(last)
    if file.read(BLOCK) != bytes(BLOCK) or last + BLOCK > end:
        raise UserError(f"{name} is damaged or cut off at byte {last - start:,}; get it again")


def read_member(file: io.BufferedIOBase, member: Member) -> bytes:
    """Returns the bytes of one member; raises OSError if they cannot be read."""
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise OSError(f"{member.name} is cut off")
    return data


def open_tar(path: Path) -> io.BufferedIOBase:
    """Opens a tar for `list_members` and `read_member`; raises `UserError` if it is missing."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; expected {path.name} in the directory of the tars"
        ) from error
