"""Reading and writing files anywhere: JSON within limits, outputs that replace and never follow a link.

A path is a local one or, where `any_path` made it, of an object in a bucket (`bvit_jax.files.buckets`).
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from bvit_jax.errors import UserError

MAX_JSON = 1 << 26  # bytes: checksums of a large model on many hosts
BUCKET = "gs://"
MAX_VALUES = 1 << 22  # commas, colons and brackets: a value can take a hundred bytes


def read_json(
    path: Path, limit: int = MAX_JSON, values: int = MAX_VALUES, keep: Callable[[Any], Any] | None = None
) -> Any:
    """Returns the JSON of a file.

    Args:
      path: of the file.
      limit: of its bytes.
      values: see `parse_json`.
      keep: returns what takes the place of an object, a dict, as soon as it is read.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no JSON, is nested deeper than Python reads, or has more than the limits.
    """
    if (size := _size(path)) > limit:
        raise ValueError(f"it has {size:,} bytes; expected at most {limit:,}")
    return parse_json(path.read_bytes().decode("utf-8-sig"), values, keep)


def parse_json(text: str, values: int = MAX_VALUES, keep: Callable[[Any], Any] | None = None) -> Any:
    """Returns the value of a JSON text; raises ValueError if it is none, or has too many or too deep values.

    ``values`` limits what separates them; ``keep`` is that of `read_json`.
    """
    if (found := sum(map(text.count, ",:[{"))) > values:
        raise ValueError(f"it has about {found:,} values; expected at most {values:,}")
    try:
        return json.loads(text, object_hook=keep)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file that holds either what it held before or all of the new content; replaces a link."""
    if in_bucket(path):
        path.write_bytes(content)
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file that then takes the place of ``path``, complete or not at all.

    A link there is replaced, not followed. Pipes and devices such as ``/dev/stdout`` are written to.
    """
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as scratch:
            yield (local := Path(scratch) / path.name)
            path.write_bytes(local.read_bytes())
        return
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def create_file(path: Path, content: bytes) -> None:
    """Writes a file that does not exist yet; of two who try at the same time, one gets `FileExistsError`."""
    if in_bucket(path):
        cast(Any, path).create(content)
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with os.fdopen(file, "wb") as opened:
            opened.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def append(path: Path, text: str, *, make: bool = False) -> None:
    """Appends text to a file, which is on the disk afterwards; a missing one is made only if asked for.

    An object in a bucket is written again, whole.
    """
    if in_bucket(path):
        before = b"" if make and not path.exists() else path.read_bytes()
        path.write_bytes(before + text.encode())
        return
    with path.open("a" if make else "r+") as file:
        file.seek(0, os.SEEK_END)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, which is made, and to no half line; it is on the disk afterwards."""
    if in_bucket(path):
        append(path, line + "\n", make=True)
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o666), "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        whole = file.read() in (b"", b"\n")
        file.write(b"" if whole else b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def copy_into(source: Path, target: Path) -> None:
    """Copies all files below a local directory to the same places below a directory in a bucket."""
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).write_bytes(file.read_bytes())


def in_bucket(path: Path) -> bool:
    """Returns whether a path is that of an object in a bucket."""
    return str(path).startswith(BUCKET)


def any_path(text: str) -> Path:
    """Returns the path that an argument names, which may be in a bucket; raises `UserError` for others."""
    if text.startswith(BUCKET) and len(text) > len(BUCKET):
        from bvit_jax.files.buckets import path_in_bucket  # here, because few have it installed

        return path_in_bucket(text)
    return local_path(text)


def local_path(text: str) -> Path:
    """Returns the path that an argument names, with ``~`` expanded; raises `UserError` for an address."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UserError(f"{text} is an address; expected a local path: copy what is there, or mount it")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}; write the path without ~") from error


def _size(path: Path) -> int:
    found: Any = path.stat()
    return int(found.length if in_bucket(path) else found.st_size)
