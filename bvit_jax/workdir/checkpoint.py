"""Checkpoints of a run: written while it goes on, complete or invisible, verified when read.

Layout below the run's directory, Orbax underneath::

    checkpoints/<step>/
        state/            the arrays
        metadata/         JSON
        checksums.json    SHA-256 of the files above, written last; renamed while the rest is deleted
        metadata.json     JSON that has replaced ``metadata/`` since, with its own SHA-256

A step without ``checksums.json`` was not completely written, or not completely deleted, and does
not exist for this module. The directory must be on a file system that all processes see.
"""

import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from bvit_jax.errors import UserError
from bvit_jax.workdir.checkpoint_files import (
    FOLDER,
    ITEMS,
    arrays_of,
    check_written,
    clear_unfinished,
    complete_steps,
    delete,
    finish,
    handler,
    make_room,
    read,
    read_metadata,
)
from bvit_jax.workdir.checksums import (
    CHECKSUMS,
    DamagedError,
    verify_checksums,
    write_replacement,
)
from bvit_jax.workdir.collectives import (
    from_first_process,
    of_all_processes,
    wait_for_all,
    wait_for_all_in_thread,
)

Kind = Literal["latest", "best"]
State = TypeVar("State")
T = TypeVar("T")

NONE, ALL_DAMAGED = -1, -2  # in place of a step

BARRIER_SECONDS = 600
OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in what TensorStore raises, a ValueError

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training run; creates their folder and clears unfinished ones.

    All processes make the same calls in the same order.

    Args:
      directory: the run's directory.
      keep: number of newest checkpoints to keep, in addition to the best one.

    Raises:
      UserError: the directory cannot be written, or is not the same one for all processes.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._folder = (directory / FOLDER).absolute()
        self._keep = keep
        self._writer = ocp.AsyncCheckpointer(handler())
        self._finisher: threading.Thread | None = None
        self._error: BaseException | None = None
        self._current: int | None = None  # the step last saved or restored, and its JSON
        self._content: dict[str, Any] = {}
        self._steps: list[int] = []
        if jax.process_index() == 0:
            _writing(self._folder, lambda: clear_unfinished(self._folder))
            self._steps = complete_steps(self._folder)
        _check_shared(self._folder)

    def save(self, step: int, state: Any, metadata: dict[str, Any], best_step: int | None = None) -> None:
        """Starts to save a tree of arrays and JSON values; returns when the arrays may change.

        What is written meanwhile becomes visible when it is complete. Before, this waits for the save
        before it. If this object has already saved or restored the step, only its JSON values are
        written, see `replace_metadata`; a step left by an earlier process is replaced. Checkpoints of
        later steps are removed: this run has not reached them.

        Args:
          step: number of the steps taken.
          state: the arrays.
          metadata: JSON values.
          best_step: the checkpoint to keep as the best one, this or an earlier step.

        Raises:
          UserError: this or the save before it could not be written.
        """
        self.wait()
        path, content = self._folder / str(step), {"best_step": best_step, "run": metadata}
        if step == self._current:
            self.replace_metadata(step, metadata, best_step)
            return
        if jax.process_index() == 0:
            _writing(self._folder, lambda: make_room(path))
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(content))
        _writing(self._folder, lambda: self._writer.save(path, args=arguments, force=True))
        self._current, self._content = step, content
        self._finisher = threading.Thread(
            target=self._finish, args=(step, arrays_of(state), best_step), name="checkpoint"
        )
        self._finisher.start()

    def replace_metadata(self, step: int, metadata: dict[str, Any], best_step: int | None = None) -> None:
        """Replaces the JSON values of the step that this object has saved or restored last.

        The change is atomic: whenever the process ends, the checkpoint exists, with the old values or the
        new ones. Waits for the save first, and deletes the checkpoints that are no longer kept. Arguments and
        errors are those of `save`.
        """
        self.wait()
        if step != self._current:
            raise ValueError(f"step {step} is not the current one, {self._current}")
        content = {"best_step": best_step, "run": metadata}
        if content == self._content:
            return
        if jax.process_index() == 0:
            _writing(self._folder, lambda: write_replacement(self._folder / str(step), content))
            self._steps = _writing(self._folder, lambda: self._prune(step, best_step))
        self._content = content

    def restore(self, abstract_state: State) -> tuple[State, dict[str, Any]] | None:
        """Returns the newest whole state and its metadata, or None if there is none.

        Damaged checkpoints are logged and skipped.

        Args:
          abstract_state: `jax.ShapeDtypeStruct` with a sharding for every array of the state.

        Raises:
          UserError: all checkpoints are damaged, or the arrays are not those of ``abstract_state``.
        """
        self.wait()
        step = NONE
        if jax.process_index() == 0:
            step = _newest_whole(self._folder, self._steps)
        step = from_first_process(step)
        if step == NONE:
            return None
        if step == ALL_DAMAGED:
            raise UserError(
                f"every checkpoint in {self._folder} is damaged; restore one from a copy, or delete that"
                " directory to start again"
            )
        state, metadata = read(self._folder / str(step), abstract_state, partial=False)
        self._current, self._content = step, metadata
        self._steps = [other for other in self._steps if other <= step]
        return state, metadata["run"]

    def latest_step(self) -> int | None:
        """Returns the newest step that is completely saved, or None; known to the first process."""
        return max(self._steps, default=None)

    def wait(self) -> None:
        """Waits until what `save` started is on disk.

        Raises:
          UserError: it could not be written.
        """
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        self.check()

    def check(self) -> None:
        """Raises the `UserError` of a save that has failed meanwhile; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            # Orbax names a file that is missing, or one it cannot rename, in a ValueError too.
            if isinstance(error, OSError | ValueError):
                raise _user_error(self._folder, error) from error
            raise error

    def close(self) -> None:
        """Waits for the last save, and releases what Orbax holds.

        Raises:
          UserError: the last save could not be written.
        """
        try:
            self.wait()
        finally:
            _writing(self._folder, self._writer.close)

    def _finish(self, step: int, wanted: dict[str, str], best_step: int | None) -> None:
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                check_written(self._folder / str(step), wanted)
                finish(self._folder / str(step))
                self._steps = self._prune(step, best_step)
                logger.info("saved step %d", step)
            # A process that ends with an error, as after SIGTERM, may take the first one with it.
            wait_for_all_in_thread(f"checkpoint of step {step}", BARRIER_SECONDS)
        except BaseException as error:  # for the thread that saves next
            self._error = error

    def _prune(self, step: int, best_step: int | None) -> list[int]:
        reached = sorted(s for s in {*self._steps, step} if s <= step)
        kept = [s for s in reached if s in reached[-self._keep :] or s == best_step]
        for other in complete_steps(self._folder):  # what appeared meanwhile and is not ours stays
            if other not in kept:
                try:
                    delete(self._folder / str(other))
                except OSError as error:  # such as a reader's open file on NFS; the next save tries again
                    logger.warning("cannot delete checkpoint %d: %s", other, error.strerror)
        return kept


def is_saved(directory: Path) -> bool:
    """Returns whether a run has a complete checkpoint, as the first process sees it; writes nothing."""
    folder = (directory / FOLDER).absolute()
    try:
        saved = jax.process_index() == 0 and bool(complete_steps(folder))
    except OSError:  # reported when the run opens the folder to write
        saved = False
    return bool(from_first_process(int(saved)))


def restore_variables(
    directory: Path, abstract: dict[str, Any], kind: Kind = "best"
) -> tuple[dict[str, Any], dict[str, Any], int] | None:
    """Returns some top-level fields of a saved state, the metadata and the step; writes nothing.

    For evaluation: ``{"params": ..., "batch_stats": ...}`` reads no optimiser state, and a run may
    be writing to the directory meanwhile.

    Args:
      directory: the run's directory.
      abstract: the fields, with `jax.ShapeDtypeStruct` leaves that carry shardings.
      kind: "latest", or "best" for the one that the latest names as such.

    Returns:
      (fields, metadata, step), or None if there is no checkpoint of that kind.

    Raises:
      UserError: the checkpoint is damaged, or its arrays are not those of ``abstract``.
    """
    folder = (directory / FOLDER).absolute()
    while True:
        step = from_first_process(_step_of_kind(folder, kind) if jax.process_index() == 0 else NONE)
        if step == NONE:
            return None
        path = folder / str(step)
        try:
            verify_checksums(path, ITEMS)
            fields, metadata = read(path, abstract, partial=True)
            return fields, metadata["run"], step
        except Exception:  # Orbax raises five types where files go while it reads
            if (path / CHECKSUMS).exists() or jax.process_count() > 1:
                raise
            logger.info("checkpoint %d is not kept any longer; looking for a newer one", step)


def _step_of_kind(folder: Path, kind: Kind) -> int:
    steps = complete_steps(folder)
    if not steps or kind == "latest":
        return max(steps, default=NONE)
    newest = folder / str(max(steps))
    try:
        verify_checksums(newest, ITEMS, only="metadata/")
        best = read_metadata(newest)["best_step"]
    except (UserError, OSError, ValueError):
        if (newest / CHECKSUMS).exists():
            raise
        return _step_of_kind(folder, kind)  # it is not kept any longer, so there is a newer one
    return best if best in steps else NONE


def _newest_whole(folder: Path, steps: list[int]) -> int:
    """Returns the newest step that is not damaged, or one of the numbers in place of it."""
    for step in sorted(steps, reverse=True):
        # Before Orbax reads: it does not notice flipped bits, and reports missing bytes in pages.
        try:
            verify_checksums(folder / str(step), ITEMS)
        except DamagedError as error:
            logger.warning("%s", error)
            continue
        return step
    return ALL_DAMAGED if steps else NONE


def _check_shared(folder: Path) -> None:
    """Raises `UserError` on all processes unless all of them see the folder of the first."""
    if jax.process_count() == 1:
        return
    token = folder / f"shared-{from_first_process(int.from_bytes(os.urandom(3)))}"
    if jax.process_index() == 0:
        _writing(folder, token.touch)
    wait_for_all("token written")
    seen = of_all_processes(np.int32(token.exists()))
    if jax.process_index() == 0:
        token.unlink(missing_ok=True)
    if not seen.all():
        raise UserError(
            f"process {int(np.argmin(seen))} does not see {folder}, which process 0 has made; --workdir must"
            " be on a file system that all hosts share"
        )


def _writing(folder: Path, write: Callable[[], T]) -> T:
    try:
        return write()
    except OSError as error:
        raise _user_error(folder, error) from error
    except ValueError as error:
        if OS_ERROR.search(str(error)) is None:  # of the caller
            raise
        raise _user_error(folder, error) from error


def _user_error(folder: Path, error: OSError | ValueError) -> UserError:
    """Returns the message for an error while a checkpoint was written."""
    if isinstance(error, TimeoutError) and jax.process_count() > 1:  # of a barrier
        return UserError(
            "the other processes of the run do not answer while a checkpoint is written; start all of them"
            " again"
        )
    if isinstance(error, TimeoutError):  # of Orbax, which goes by the clock
        return UserError(
            f"a checkpoint in {folder} was not written in time: the disk does not answer, or the clock was"
            " set forward; the ones before are kept; run the same command again"
        )
    code = OS_ERROR.search(str(error))
    reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
    reason = reason or str(error).partition("\n")[0]
    return UserError(f"cannot write checkpoints to {folder}: {reason}; make room or choose another workdir")
