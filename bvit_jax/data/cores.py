"""How many cores there are to share."""

import os


def usable_cores() -> int:
    """Returns the number of cores that the system lets this process use, which may be fewer than it has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
