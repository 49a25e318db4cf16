"""Files and directories that appear complete or not at all."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Yields a path to write to, whose content becomes ``target`` at the end, complete or not at all."""
    taken = UserError(f"{target} exists; delete it or choose another target")
    try:
        if os.path.lexists(target):
            raise taken
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".convert.", dir=target.parent) as scratch:
            partial = Path(scratch) / "partial"
            yield partial
            _move(partial, target)
    except (FileExistsError, NotADirectoryError) as error:
        raise taken if os.path.lexists(target) else UserError(f"cannot write {target}: {error}") from error
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        if isinstance(error, OSError) and error.errno == errno.ENOTEMPTY:
            raise taken from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}") from error


def _move(partial: Path, target: Path) -> None:
    """Renames a directory or a file; never replaces another file."""
    if partial.is_dir():
        partial.rename(target)
        return
    try:
        os.link(partial, target)
    except PermissionError:  # a file system without links
        partial.rename(target)


def write(path: Path, content: bytes) -> None:
    """Writes a file, which is on the disk afterwards."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def to_json(values: Mapping[str, Any]) -> bytes:
    """Returns values as the content of a JSON file."""
    return (json.dumps(values, indent=2) + "\n").encode()
