"""Images per second of the input pipeline on this machine's cores: `benchmarks.input_pipeline`, short."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import input_pipeline
from benchmarks.input_pipeline import WARM_UP
from bvit_jax.data.cores import usable_cores


def photographs(images: int, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the speeds of its rounds for training and evaluation, of images on top of the first batches."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found.json"
        counts = {"images": images, "measured": images - WARM_UP * batch, "batch": batch, "rounds": rounds}
        arguments = [part for name, count in counts.items() for part in (f"--{name}", str(count))]
        input_pipeline.main(["--alone", "--uint8", *arguments, "--json", str(found)])
        yield {"cores": usable_cores(), "images_per_second": json.loads(found.read_text())["bvit_jax"]}
