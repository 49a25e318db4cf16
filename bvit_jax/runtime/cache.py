"""Where compiled programs are kept."""

import hashlib
import os
import re
from pathlib import Path


def cache_directory() -> Path | None:
    """Returns a place in the user's cache directory, None for a user without a home.

    Programs for CPUs hold instructions of the CPU they were compiled on, so each kind has one of its own.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return home / "bvit_jax" / _kind_of_cpu()


def _kind_of_cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "any"
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return hashlib.sha256((flags[1] if flags else "").encode()).hexdigest()[:8]
