"""One process that classifies one image, and writes when it has come how far and what memory it holds.

`inference` starts a new process for each figure. It prints a line of JSON after each stage: the name of the
stage, the resident memory then, and, in the last, the peak. The reader of the lines takes the time.
"""

import json
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


def memory() -> dict[str, int]:
    """Returns the resident memory of this process and its peak, bytes; of Linux alone.

    The peak that `resource` reports begins with the memory of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    found = {"resident": values["VmRSS"], "peak": values["VmHWM"]}
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


def main(subject_file: str) -> None:
    """Runs the process."""
    for stage in stages(subject_file):
        print(json.dumps({"stage": stage, **memory()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
