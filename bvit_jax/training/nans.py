"""Finding the operation that produces a NaN."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from bvit_jax.errors import UserError
from bvit_jax.runtime import distributed

PACKAGE = Path(__file__).parents[1]
CALLS = 3  # lines of this package that are named, the operation's first


@contextmanager
def named_nans() -> Iterator[None]:
    """Stops when a compiled function returns a NaN, reruns it operation by operation, and names the cause.

    Raises:
      UserError: there was one; or this is one of several processes.
    """
    if distributed.is_active():
        raise UserError("--debug_nans runs in one process; continue the run's copy on one host with it")
    with jax.debug_nans(True):
        try:
            yield
        except FloatingPointError as error:
            raise UserError(f"{error}, at {_calls(error)}") from error


def _calls(error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    return ", called from ".join(
        f"{Path(frame.filename).relative_to(PACKAGE.parent)}:{frame.lineno} ({frame.line})"
        for frame in reversed(frames[-CALLS:])
    )
