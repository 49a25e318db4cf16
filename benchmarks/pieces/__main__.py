"""The process of one piece: ``python -m benchmarks.pieces RESULT.json``, what to call as JSON on stdin."""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks import stand_ins
from benchmarks.pieces.piece import one_line


def main(result: Path, request: dict[str, Any]) -> int:
    """Calls what is asked for and writes, after each thing that it yields, all that was found.

    Returns:
      The exit status: 1 if it failed, and what was found has the ``error``.
    """
    stand_ins.provide()
    module, _, function = request["call"].partition(":")
    found: dict[str, Any] = {}
    try:
        call = getattr(importlib.import_module(module), function)
        for more in call(**request["arguments"]):
            found |= more
            _write(result, found)
    except Exception as error:  # whatever it is, the next piece goes on
        traceback.print_exc()
        _write(result, found | {"error": one_line(error)})
        return 1
    return 0


def _write(path: Path, found: dict[str, Any]) -> None:
    """Replaces the file at once: its reader may come at any time."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found))
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.load(sys.stdin)))
