"""SHA-256 of the files of a checkpoint, and JSON that replaces older JSON at once."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError
from bvit_jax.files import read_json, replace_file

CHECKSUMS = "checksums.json"
REPLACED = "metadata.json"


class DamagedError(UserError):
    """A checkpoint is not as it was written."""


def write_checksums(path: Path, items: Sequence[str]) -> None:
    """Writes the checksums of all files in some directories of a checkpoint, which makes it complete."""
    files = sorted(file for item in items for file in (path / item).rglob("*") if file.is_file())
    _write_json(path / CHECKSUMS, {file.relative_to(path).as_posix(): _sha256(file) for file in files})


def verify_checksums(path: Path, items: Sequence[str], only: str = "") -> None:
    """Verifies the files of a checkpoint, which are in some directories of it, or ``only`` those of one.

    Raises:
      DamagedError: a file is missing or differs from what was written.
      UserError: a file cannot be read.
    """
    name = CHECKSUMS
    try:
        checksums = read_json(path / CHECKSUMS)
        if {name.split("/")[0] for name in checksums} != set(items):
            raise ValueError(f"does not list the files of {' and '.join(items)} alone")
        for name, expected in checksums.items():
            if ".." in name.split("/"):
                raise ValueError("is outside of the checkpoint")
            if name.startswith(only) and _sha256(path / name) != expected:
                raise ValueError("does not match its checksum")
        name = REPLACED
        if (path / REPLACED).exists():
            replaced = read_json(path / REPLACED)
            if _sha256_of_json(replaced["content"]) != replaced["sha256"]:
                raise ValueError("does not match its checksum")
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise DamagedError(
            f"checkpoint {path} is damaged: {name}: {reason};"
            " delete that directory to use the checkpoint before it, or restore it from a copy"
        ) from error
    except OSError as error:  # a network file system that is away for a moment is no damage
        raise UserError(f"cannot read checkpoint {path}: {name}: {error.strerror}; try again") from error


def write_replacement(path: Path, content: Any) -> None:
    """Writes JSON values that count instead of those that a checkpoint was saved with; atomic."""
    _write_json(path / REPLACED, {"sha256": _sha256_of_json(content), "content": content})


def read_replacement(path: Path) -> Any | None:
    """Returns what `write_replacement` wrote last, None if it was never called."""
    replaced = path / REPLACED
    return read_json(replaced)["content"] if replaced.exists() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, values: Any) -> None:
    replace_file(path, json.dumps(values, indent=1).encode())
