"""Runs a packed model where only JAX, NumPy, safetensors and Pillow are: python -m tests.lean MODEL IMAGE.

Prints the probabilities as JSON.
"""

import importlib.abc
import json
import sys
from typing import Any

MISSING = {
    *("flax", "ml_collections", "absl", "jaxtyping", "optax", "orbax", "tensorflow_datasets", "grain"),
    *("array_record", "rich", "sklearn", "google_crc32c", "importlib_resources", "torch", "tensorboardX"),
}


class Missing(importlib.abc.MetaPathFinder):
    """Finds none of the packages that are not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raises ImportError for them; leaves others to Python."""
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, Missing())
    import bvit_jax

    model = bvit_jax.load(sys.argv[1])
    probabilities = bvit_jax.predict(model, [sys.argv[2]])
    assert not MISSING & {name.partition(".")[0] for name in sys.modules}
    answer = {"name": model.config.name, "probabilities": probabilities.tolist()}
    sys.stdout.write(json.dumps(answer) + "\n")
