"""Objects of a Google Cloud Storage bucket, addressed like files: ``gs://bucket/run/config.json``.

They are read and written by `etils.epath` through gcsfs, as Orbax does. What differs from a file system: an
object is written whole, and appears when it is; a directory exists while it has objects; renaming may copy
and delete.
"""

import errno
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import fsspec
from etils.epath.gpath import PosixGPath

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its errors come as exceptions, too
# Other hosts write to the bucket, too.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

_CODES = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST, PermissionError: errno.EACCES}
_READING = ("exists", "is_dir", "stat", "read_bytes", "read_text")
_METHODS = (*_READING, "write_bytes", "write_text", "unlink", "rmtree", "rename", "replace", "create")


def path_in_bucket(address: str) -> Path:
    """Returns the path of an address that begins with ``gs://``."""
    return cast(Path, _ObjectPath(address))


def _raises_os_error(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method whose errors are those of a file system: `OSError` with a reason."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except OSError as error:
            if error.strerror:
                raise
            code = _CODES.get(type(error), errno.EIO)
            reason = _first_line(error) if code == errno.EIO else os.strerror(code)
            raise OSError(code, reason, str(self)) from error
        except ImportError as error:
            raise OSError(errno.EIO, "gcsfs is missing; pip install 'bvit_jax[gcs]'", str(self)) from error
        except Exception as error:  # of HTTP and of credentials, from three packages
            raise OSError(errno.EIO, _first_line(error), str(self)) from error

    return call


class _ObjectPath(PosixGPath):
    """An object of a bucket, or what would be a directory of objects."""

    def is_symlink(self) -> bool:
        """Returns False."""
        return False

    def resolve(self, strict: bool = False) -> Self:
        """Returns the path itself, which is absolute."""
        return self

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a directory appears with its first object."""

    def rmdir(self) -> None:
        """Does nothing: a directory is gone with its last object."""

    def rglob(self, pattern: str) -> Iterator["_ObjectPath"]:
        """Yields the objects below whose names match."""
        for path in self.iterdir():
            if path.is_dir():
                yield from path.rglob(pattern)
            elif path.match(pattern):
                yield path

    def iterdir(self) -> Iterator["_ObjectPath"]:
        """Yields what is directly below."""
        yield from self._listed()

    def create(self, content: bytes) -> None:
        """Writes an object that is not there; raises `FileExistsError` if it is."""
        fsspec.filesystem("gcs").pipe_file(str(self), content, mode="create")

    @_raises_os_error
    def _listed(self) -> list["_ObjectPath"]:
        try:
            return list(super().iterdir())
        except FileNotFoundError:  # nothing is below
            return []


for _name in _METHODS:
    setattr(_ObjectPath, _name, _raises_os_error(getattr(_ObjectPath, _name)))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
