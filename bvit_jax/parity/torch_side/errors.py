"""The one exception that ends the program with a line for the user."""

from __future__ import annotations


class Refused(Exception):
    """The request cannot be met; the message is one line for the user."""


def one_line(error: BaseException) -> str:
    """Returns the type and the first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
