"""The one exception that commands turn into a one-line message."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """Something outside the program is wrong: a path, a config value, a file.

    The message names the value, what was expected and what to do, in one line. Commands print it
    after ``error:`` and exit with status 1; every other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Returns text from anywhere as one line that does nothing to a terminal.

    Line breaks become spaces; control characters, such as the escapes in a file's name, and bytes that are
    no UTF-8 become their codes.
    """
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest of ``known``, or the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end; raised in the main thread, like Python's own at Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; run the same command again")
        self.number = number


class Interrupted(Exception):
    """The run was asked to stop by a signal, and stopped after ``step``, which is saved."""

    def __init__(self, step: int = 0, number: int = signal.SIGTERM) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} at step {step}; run the same command again to continue")
        self.number = number
