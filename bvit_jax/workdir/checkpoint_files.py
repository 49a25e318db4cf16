"""The files of checkpoints: which there are, what may be deleted, and how one is read."""

import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp

from bvit_jax.errors import UserError
from bvit_jax.files import in_bucket, read_json
from bvit_jax.workdir.checksums import CHECKSUMS, read_replacement, write_checksums

FOLDER = "checkpoints"
ITEMS = ("state", "metadata")
PATTERN = "*?[\\"  # Orbax looks for the parts of a checkpoint with a pattern that begins with its path
DELETED = "deleted.json"  # the checksums of a checkpoint that is being deleted
METADATA = "metadata/metadata"  # where Orbax puts JSON values
KEYS = {"best_step", "run"}  # of those values
MARK = ".unfinished"  # of what is being written to a bucket
STEP = re.compile(r"0|[1-9][0-9]*")
UNFINISHED = re.compile(rf"({STEP.pattern})\.orbax-checkpoint-tmp.*")  # what Orbax is still writing


def handler() -> ocp.CompositeCheckpointHandler:
    """Returns what Orbax writes and reads a checkpoint with."""
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler()
    )


def all_steps(folder: Path) -> list[int]:
    """Returns the steps of all checkpoints in a folder, incomplete ones too, ascending."""
    return sorted(int(path.name) for path in folder.iterdir() if STEP.fullmatch(path.name))


def complete_steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, ascending; none if there is no folder."""
    if not folder.is_dir():
        return []
    return [step for step in all_steps(folder) if (folder / str(step) / CHECKSUMS).exists()]


def foreign_steps(folder: Path) -> list[Path]:
    """Returns what has the name of a step and is neither a complete checkpoint nor a half one of ours."""
    if not folder.is_dir():
        return []
    paths = [folder / str(step) for step in all_steps(folder)]
    return [path for path in paths if not (path / CHECKSUMS).exists() and not _left_by_us(path)]


def clear_unfinished(folder: Path) -> None:
    """Deletes steps that were not completely written; whatever else is in the folder is not ours."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = []
    for path in folder.iterdir():
        if in_bucket(folder) and path.name.endswith(MARK):
            marks.append(path)
        incomplete = STEP.fullmatch(path.name) and not (path / CHECKSUMS).exists() and _left_by_us(path)
        if incomplete or (UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()):
            delete(path)
    for mark in marks:  # last: they say which of the steps were ours
        mark.unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Deletes a checkpoint, which is invisible at once; of a link the link alone, since a copy is somebody's.

    What marks it as ours goes last, so that what a kill leaves can be deleted, too.
    """
    if path.is_symlink():
        path.unlink()
        return
    if (path / CHECKSUMS).exists():
        (path / CHECKSUMS).replace(path / DELETED)
    marks = (path / Path(METADATA).parent, path / DELETED)
    for inside in (*(each for each in path.iterdir() if each not in marks), *marks):
        if inside.is_dir() and not inside.is_symlink():
            _remove_tree(inside)
        else:
            inside.unlink(missing_ok=True)
    path.rmdir()
    if in_bucket(path):
        _mark(path).unlink(missing_ok=True)


def make_room(path: Path) -> None:
    """Deletes a checkpoint that is saved again.

    In a bucket, Orbax writes where the checkpoint is to be, so a mark says whose an unfinished one is.

    Raises:
      FileNotFoundError: the folder of all checkpoints is gone; Orbax would create another one.
    """
    if not in_bucket(path):
        path.parent.stat()
    if path.is_symlink() or path.exists():
        delete(path)
    if in_bucket(path):
        _mark(path).write_bytes(b"")


def finish(path: Path) -> None:
    """Makes a checkpoint that Orbax has written complete."""
    write_checksums(path, ITEMS)
    if in_bucket(path):
        _mark(path).unlink(missing_ok=True)


def _left_by_us(path: Path) -> bool:
    """Returns whether a directory without checksums is what a kill left of a checkpoint of ours."""
    if path.is_symlink() or not path.is_dir():
        return False
    if in_bucket(path) and _mark(path).exists():
        return True
    if (path / DELETED).exists() or not any(inside.is_file() for inside in path.rglob("*")):
        return True
    try:
        return set(read_json(path / METADATA)) == KEYS
    except (OSError, ValueError, TypeError):
        return False


def _remove_tree(path: Path) -> None:
    if in_bucket(path):
        cast(Any, path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path)


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}{MARK}")


def check_path(folder: Path) -> None:
    """Raises `UserError` for a path below which Orbax could not find again what it has written."""
    wrong = sorted({*str(folder)} & {*PATTERN})
    if wrong or str(folder).encode(errors="replace") != os.fsencode(folder):
        found = f"{' '.join(wrong)} in it" if wrong else "names in it that are not UTF-8"
        raise UserError(
            f"checkpoints below {ascii(str(folder))[1:-1]} could not be read again, because of {found};"
            " choose a --workdir of letters, digits and - _ = . ,"
        )


def check_written(path: Path, wanted: dict[str, str]) -> None:
    """Raises `UserError` unless Orbax finds these `arrays_of` a state in what it has written."""
    try:
        saved = arrays_of(ocp.PyTreeCheckpointHandler().metadata(path / ITEMS[0]).tree)
        missing = sorted(set(wanted.items()) ^ set(saved.items()))
        problem = f"{missing[0][0]} is another one" if missing else ""
    except (OSError, ValueError) as error:
        problem = str(error).splitlines()[0].partition(" [")[0]
    if problem:
        raise UserError(
            f"checkpoint {path} was written and cannot be read back: {problem}; the ones before are kept:"
            " check the disk, or choose another workdir"
        )


def read(path: Path, abstract: Any, *, partial: bool) -> tuple[Any, dict[str, Any]]:
    """Returns the arrays and the JSON of a checkpoint, whose checksums have been verified.

    Args:
      path: of the checkpoint.
      abstract: `jax.ShapeDtypeStruct` with a sharding for every array.
      partial: whether the checkpoint may hold more top-level fields.

    Raises:
      UserError: the arrays are not those of ``abstract``.
    """
    metadata = read_metadata(path)
    if (path / "state/ocdbt.process_0").exists() and not (path / "state/manifest.ocdbt").exists():
        raise UserError(
            f"the arrays of checkpoint {path} are in parts that were not put together, because the workdir"
            " had a path with brackets; the parts are in state/ocdbt.process_*: use another checkpoint"
        )
    with ocp.Checkpointer(handler()) as reader:
        saved = reader.metadata(path).item_metadata["state"].tree
        if partial:
            saved = {name: saved[name] for name in abstract if name in saved}
        _check_arrays(path, arrays_of(saved), arrays_of(abstract))
        restored = reader.restore(
            path,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=partial,
                )
            ),
        )
    return restored["state"], metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """Returns ``best_step`` and ``run`` of a checkpoint; raises `UserError` if it holds something else."""
    metadata = read_replacement(path)
    if metadata is None:
        metadata = read_json(path / METADATA)
    if not isinstance(metadata, dict) or metadata.keys() != KEYS:
        raise UserError(
            f"checkpoint {path} was written by another version of this package, which must read it; or choose"
            " another workdir"
        )
    return metadata


def arrays_of(tree: Any) -> dict[str, str]:
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
