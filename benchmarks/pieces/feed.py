"""Images per second of the input pipeline on this machine's cores: `benchmarks.input_pipeline`, short."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import input_pipeline
from benchmarks.machine import cores


def photographs(images: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the speeds of its rounds for training and evaluation."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found.json"
        arguments = ["--alone", "--images", str(images), "--measured", str(images), "--rounds", str(rounds)]
        input_pipeline.main([*arguments, "--uint8", "--json", str(found)])
        yield {"cores": cores(), "images_per_second": json.loads(found.read_text())["bvit_jax"]}
