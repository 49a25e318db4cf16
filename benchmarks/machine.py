"""What a benchmark's figures depend on besides the machine: the commit."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """Returns the commit of this checkout, marked where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        ran = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() or None
