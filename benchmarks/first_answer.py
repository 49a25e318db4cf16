"""One process that classifies one image, and writes when it has come how far and what memory it holds.

`inference` starts it anew for each figure. It prints a line of JSON after each stage, with the name of the
stage, the resident memory then, and, in the last, the peak; whoever reads the lines takes the time.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

STAGES = ("interpreter", "numpy", "framework", "model", "first image")


def stages(subject_file: str) -> Iterator[str]:
    """Goes through the stages of a pickled `inference_sides.Subject`, and yields the name of each."""
    yield "interpreter"
    import numpy as np

    yield "numpy"
    import pickle

    from benchmarks import inference_sides

    subject: inference_sides.Subject = pickle.loads(Path(subject_file).read_bytes())
    inference_sides.place(subject)
    size = subject.settings["image_size"]
    images = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    if subject.side in inference_sides.OURS:
        import jax

        jax.devices()  # starts the backend
        yield "framework"
        classifier = inference_sides.load(subject)
        jax.block_until_ready(classifier.variables)
        yield "model"
        classifier.predict(images)
    else:
        import torch

        yield "framework"
        model = inference_sides.torch_model(subject)
        if subject.side == inference_sides.REFERENCE_COMPILED:
            model = torch.compile(model)
        yield "model"
        with torch.no_grad():
            model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).logits.numpy()
    yield "first image"


def resident() -> int:
    """Returns the resident memory of this process, bytes; of Linux alone."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(subject_file: str) -> None:
    """Runs the process."""
    import resource

    for stage in stages(subject_file):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"stage": stage, "resident": resident(), "peak": peak}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
