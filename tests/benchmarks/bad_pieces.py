"""Pieces of `benchmarks.accelerator` that end in other ways than well."""

import os
import sys
import time
from collections.abc import Iterator


def breaks(how: str) -> Iterator[dict[str, int]]:
    """Yields something, then ends in some way."""
    yield {"first": 1}
    if how == "raise":
        raise ValueError("what is wrong\nand much more")
    if how == "exit":
        sys.exit(7)
    if how == "abort":
        os.write(2, b"F0000 unknown flag\n  @ a stack\n")
        os.abort()
    if how == "hang":
        time.sleep(600)
