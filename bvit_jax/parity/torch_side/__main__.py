"""The command: ``python torch_side {describe,dump} REQUEST.json``, see ``__init__.py``."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout

# bvit_jax need not be importable here: this directory is a package of its own. Neither it nor its parent
# stays in the path, where they could shadow modules of the checkout.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != HERE]

try:
    import numpy  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    sys.stderr.write(
        f"error: {sys.executable} has no module {error.name!r}; "
        "install PyTorch and transformers there, or name another Python with --python\n"
    )
    sys.exit(2)

sys.path.insert(0, os.path.dirname(HERE))
from torch_side.errors import Refused  # noqa: E402
from torch_side.request import Request, dump  # noqa: E402

del sys.path[0]


def main() -> int:
    command, path = sys.argv[1:]
    try:
        with open(path) as file:
            request = Request(json.load(file))
        if command == "describe":
            sys.stdout.write(json.dumps(request.description()))
        else:
            with redirect_stdout(sys.stderr):  # the checkout prints while it builds
                dump(request)
    except Refused as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
