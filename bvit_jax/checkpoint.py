"""Checkpoints of a run: complete or invisible, verified when read, Orbax underneath.

Layout below the run's directory::

    checkpoints/<step>/   the newest ones
    best/<step>/          the best one
        state/            the arrays
        metadata/         JSON
        checksums.json    SHA-256 of the files above, written last and removed first

A step without ``checksums.json`` was not completely written, or not completely deleted, and does
not exist for this module. The directory must be on a file system all processes see.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bvit_jax.errors import UserError

Kind = Literal["latest", "best"]
State = TypeVar("State")

FOLDERS: dict[Kind, str] = {"latest": "checkpoints", "best": "best"}
ITEMS = ("state", "metadata")
CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints of one training run; creates their folders and clears unfinished ones.

    All processes make the same calls in the same order.

    Args:
      directory: the run's directory.
      keep: number of latest checkpoints to keep; of the best, one is kept.

    Raises:
      UserError: the directory cannot be written.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._latest = _Series(directory / FOLDERS["latest"], keep=keep, create=True)
        self._best = _Series(directory / FOLDERS["best"], keep=1, create=True)

    def save_latest(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Saves a tree of arrays and JSON values; returns when they are on disk.

        A step that this object has saved or restored is not written again; one left by an earlier
        run of the process is replaced. Checkpoints of later steps are removed: this run has not
        reached them.

        Raises:
          UserError: the directory cannot be written.
        """
        self._latest.save(step, state, metadata)

    def save_best(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Like `save_latest`, replacing the best checkpoint."""
        self._best.save(step, state, metadata)

    def restore(self, kind: Kind, abstract_state: State) -> tuple[State, dict[str, Any]] | None:
        """Returns the newest state and metadata of a kind, or None if there is none.

        Args:
          kind: "latest" or "best".
          abstract_state: `jax.ShapeDtypeStruct` with a sharding for every array of the state.

        Raises:
          UserError: the checkpoint is damaged, or its arrays are not those of ``abstract_state``.
        """
        series = self._latest if kind == "latest" else self._best
        return series.restore(abstract_state, partial=False)

    def latest_step(self) -> int | None:
        """Returns the newest step saved, or None."""
        return self._latest.newest()

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint, or None."""
        return self._best.newest()

    def close(self) -> None:
        """Releases what Orbax holds."""
        self._latest.manager.close()
        self._best.manager.close()


def restore_variables(
    directory: Path, abstract: dict[str, Any], kind: Kind = "best"
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns some top-level fields of a saved state, and the metadata; changes nothing on disk.

    For evaluation: ``{"params": ..., "batch_stats": ...}`` reads no optimiser state, and a run may
    be writing to the directory meanwhile.

    Args:
      directory: the run's directory.
      abstract: the fields, with `jax.ShapeDtypeStruct` leaves that carry shardings.
      kind: "best" or "latest".

    Returns:
      (fields, metadata), or None if there is no checkpoint of that kind.

    Raises:
      UserError: the checkpoint is damaged, or its arrays are not those of ``abstract``.
    """
    if not (directory / FOLDERS[kind]).is_dir():
        return None
    series = _Series(directory / FOLDERS[kind], keep=1, create=False)
    try:
        return series.restore(abstract, partial=True)
    finally:
        series.manager.close()


class _Series:
    """The checkpoints in one folder. Which steps exist is read once, then kept in memory."""

    def __init__(self, folder: Path, *, keep: int, create: bool) -> None:
        self.folder = folder.absolute()
        self.keep = keep
        self.current: int | None = None  # the step this object last saved or restored
        options = ocp.CheckpointManagerOptions(
            create=create,
            cleanup_tmp_directories=create,
            enable_async_checkpointing=False,
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        self.manager = _writing(
            self.folder,
            lambda: ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers),
        )
        self.steps = [s for s in self.manager.all_steps() if (self._path(s) / CHECKSUMS).exists()]

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def newest(self) -> int | None:
        return max(self.steps, default=None)

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        if step == self.current and step in self.steps:
            return
        if step in self.manager.all_steps():
            self._delete(step)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(metadata))
        _writing(self.folder, lambda: self.manager.save(step, args=args, force=True))
        self.manager.wait_until_finished()
        if jax.process_index() == 0:
            _writing(self.folder, lambda: _write_checksums(self._path(step)))
        multihost_utils.sync_global_devices(f"checkpoint {self.folder.name} {step}")
        self.current = step
        self.steps = sorted(s for s in {*self.steps, step} if s <= step)[-self.keep :]
        for other in set(self.manager.all_steps()) - set(self.steps):
            self._delete(other)

    def _delete(self, step: int) -> None:
        if jax.process_index() == 0:
            (self._path(step) / CHECKSUMS).unlink(missing_ok=True)
        self.manager.delete(step)

    def restore(self, abstract: Any, *, partial: bool) -> tuple[Any, dict[str, Any]] | None:
        step = self.newest()
        if step is None:
            return None
        # Before Orbax reads: it does not notice flipped bits, and reports missing bytes in pages.
        _verify_checksums(self._path(step))
        saved = self.manager.item_metadata(step)["state"].tree
        if partial:
            saved = {name: saved[name] for name in abstract if name in saved}
        _check_arrays(self._path(step), _arrays(saved), _arrays(abstract))
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=partial,
                ),
                metadata=ocp.args.JsonRestore(),
            ),
        )
        self.current = step
        return restored["state"], restored["metadata"]


T = TypeVar("T")


def _writing(folder: Path, write: Callable[[], T]) -> T:
    try:
        return write()
    except (OSError, ValueError) as error:
        # TensorStore raises a ValueError that ends in, for example, [os_error_code='28'].
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None and isinstance(error, ValueError):
            raise
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write checkpoints to {folder}: {reason}; make room or choose another workdir"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_checksums(path: Path) -> None:
    files = sorted(f for item in ITEMS for f in (path / item).rglob("*") if f.is_file())
    checksums = {str(f.relative_to(path)): _sha256(f) for f in files}
    temporary = path / f"{CHECKSUMS}.tmp"
    with temporary.open("w") as file:
        json.dump(checksums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path / CHECKSUMS)


def _verify_checksums(path: Path) -> None:
    name = CHECKSUMS
    try:
        for name, expected in json.loads((path / CHECKSUMS).read_bytes()).items():
            if _sha256(path / name) != expected:
                raise ValueError("does not match its checksum")
    except (OSError, ValueError, AttributeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(
            f"checkpoint {path} is damaged: {name}: {reason};"
            " delete that directory to use the checkpoint before it, or restore it from a copy"
        ) from error


def _arrays(tree: Any) -> dict[str, str]:
    """Returns ``{"params/head/kernel": "float32[384,10]", ...}``."""

    def describe(leaf: Any) -> str:
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): describe(x) for p, x in leaves}


def _check_arrays(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in [*wanted, *saved]:
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise UserError(
                f"checkpoint {path} does not fit this configuration: {name} is {there} in it and"
                f" {here} here; use the configuration it was trained with or another workdir"
            )
