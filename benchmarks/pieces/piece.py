"""What a piece is: a function that is called in a process of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bvit_jax.errors import UserError

# In the order of their value.
PARTS = {
    "numbers": "golden files in float64, and what narrower types change",
    "speed": "training and evaluation next to the PyTorch code",
    "run": "a training run that is interrupted, resumed and repeated",
    "levers": "ways to execute the training step, and types of the codes",
    "feed": "the input pipeline on this machine's cores",
}


@dataclass(frozen=True)
class Piece:
    """One measurement.

    Attributes:
      part: a name of `PARTS`.
      name: what it measures, unique in its part.
      seconds: how long it is expected to take on one H100, compiling included.
      call: ``module:function``, which takes ``arguments`` and yields dictionaries ready for JSON. They are
        merged, and those that it has yielded are kept if it fails later.
      arguments: ready for JSON.
      environment: variables that its process has in addition.
      needs: what it cannot do without: "" or one of `benchmarks.pieces.catalogue.NEEDS`.
    """

    part: str
    name: str
    seconds: int
    call: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""


def one_line(error: Exception) -> str:
    """Returns the first line of an error, with its type unless it was written for users."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"[:300]
