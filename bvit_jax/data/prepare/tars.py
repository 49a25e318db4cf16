"""Reads uncompressed tar files, also nested ones, by the offsets of their members."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from bvit_jax.data.splits import one_line
from bvit_jax.errors import UserError

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its name, and offset and size of its bytes in the (outer) tar file."""

    name: str
    offset: int
    size: int


def list_members(file: BinaryIO, name: str, start: int = 0, end: int | None = None) -> Iterator[Member]:
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
    last = start
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                last = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if last > end:
                    raise UserError(f"{name} is cut off in the middle of {member.name}; get it again")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{name} holds {member.name}, which is not a regular file; get it again")
                yield Member(str(PurePosixPath(member.name)), member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{name} is damaged or cut off: {one_line(error)}; get it again") from error
    # tarfile takes a damaged header for the end of the tar; a real end is a block of zeros.
    file.seek(last)
    if file.read(BLOCK) != bytes(BLOCK) or last + BLOCK > end:
        raise UserError(f"{name} is damaged or cut off at byte {last - start:,}; get it again")


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Returns the bytes of one member; raises OSError if they cannot be read."""
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise OSError(f"{member.name} is cut off")
    return data


def open_tar(path: Path) -> BinaryIO:
    """Opens a tar for `list_members` and `read_member`; raises `UserError` if it is missing."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; expected {path.name} in the directory of the tars"
        ) from error
