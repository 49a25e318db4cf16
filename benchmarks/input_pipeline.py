"""Measures the input pipeline, and a torchvision DataLoader that does the same work, for comparison.

    python -m benchmarks.input_pipeline --rounds 5

Both sides read the same JPEG files, made from scikit-learn's two photographs at ImageNet's usual size,
decode them with Pillow, crop, resize, flip and normalise, and hand out batches of float32: the DataLoader
with ToTensor and Normalize in its workers, as the recipes do, ours as uint8 that the device normalises
(here the same CPU). ``--uint8`` leaves normalisation out on both sides. The first evaluation batches are
compared before that: they are equal bit for bit. Each side lives in a process of its own and sleeps
while the other is measured; the sides alternate, so that the noise of the machine hits both.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 224
SPLITS = {"train": "training", "validation": "evaluation"}
SEED = 0
STEP_IMAGES_PER_SECOND = 3000  # of a v5e-8: an assumption, see --step

WARM_UP = 4  # batches that fill the queues before the clock starts
_LIBRARIES: list[Any] = []  # kept alive

Batches = Callable[[str, bool], Iterator[np.ndarray]]  # of a split, whether in uint8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.deit and not arguments.alone:
        raise SystemExit("error: --deit has no counterpart in torchvision; add --alone")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_images(directory, arguments.images)
        context = multiprocessing.get_context("spawn")
        sides = {"bvit_jax": Worker(context, our_batches, directory, arguments)}
        if not arguments.alone:
            sides["torchvision"] = Worker(context, torch_batches, directory, arguments)
            _compare([side.digest() for side in sides.values()])
        speeds: dict[str, dict[str, list[float]]] = {
            side: {kind: [] for kind in SPLITS.values()} for side in sides
        }
        for _ in range(arguments.rounds):
            for split, kind in SPLITS.items():
                for name_of_side, side in sides.items():
                    speeds[name_of_side][kind].append(side.images_per_second(split))
        for side in sides.values():
            side.close()
    _print(speeds, arguments)
    return 0


def make_images(directory: Path, count: int) -> None:
    """Writes ``count`` JPEG files and the TFDS dataset ``photographs`` of the same bytes."""
    import tensorflow_datasets as tfds
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(SEED)
    encoded = []
    for i in range(count):
        image = photographs[i % len(photographs)]
        # Half to all of a photograph, at one of ImageNet's common sizes: about 110 kB each.
        width = int(rng.integers(320, 640))
        height = width * 2 // 3
        left, top = int(rng.integers(640 - width + 1)), int(rng.integers(427 - height + 1))
        size = ((500, 375), (375, 500), (500, 333))[i % 3]
        buffer = io.BytesIO()
        image.crop((left, top, left + width, top + height)).resize(size).save(buffer, "JPEG", quality=95)
        encoded.append(buffer.getvalue())
        (directory / f"{i:05}.jpg").write_bytes(encoded[-1])

    class Photographs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=1)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples() for split in SPLITS}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, content in enumerate(encoded):
                yield i, {"image": io.BytesIO(content), "label": 0}

    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        Photographs(data_dir=directory).download_and_prepare(file_format="array_record")
    finally:
        sys.stdout = stdout


def our_batches(directory: Path, arguments: argparse.Namespace) -> Batches:
    """Returns the batches of this project's pipeline."""
    import jax
    import jax.numpy as jnp

    from bvit_jax import data
    from bvit_jax.augment.normalization import Normalization
    from bvit_jax.config import default_config

    config = default_config().data
    config.dataset, config.data_dir = "photographs", str(directory)
    config.num_threads = arguments.workers
    if arguments.deit:
        config.crop_interpolation, config.auto_augment = "bicubic", "rand-m9-mstd0.5-inc1"
        config.repeats = 3
    normalized = Normalization(config.mean, config.std)
    # Into memory of an earlier batch, as an accelerator's allocator would: fresh pages cost a CPU dearly.
    normalize = jax.jit(lambda memory, images: normalized(images), donate_argnums=0, keep_unused=True)

    def batches(split: str, uint8: bool) -> Iterator[Any]:
        if split == "train":
            source = data.train_batches(config, SIZE, arguments.batch, SEED)
        else:
            source = data.eval_batches(config, SIZE, arguments.batch)
        if uint8:
            yield from (batch["image"] for batch in source)
            return
        shape = (arguments.batch, SIZE, SIZE, 3)
        free, waiting = deque(jnp.zeros(shape, jnp.float32) for _ in range(3)), deque[jax.Array]()
        for batch in source:
            waiting.append(normalize(free.popleft(), batch["image"]))
            if len(waiting) > 1:  # the device works on one batch while the host makes the next
                yield jax.block_until_ready(waiting[0])
                free.append(waiting.popleft())
        yield from waiting

    return batches


def torch_batches(directory: Path, arguments: argparse.Namespace) -> Batches:
    """Returns the batches of torchvision's transforms in a DataLoader."""
    import torch

    _declare_operators(torch)
    from torchvision import transforms

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    train = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    bicubic = transforms.InterpolationMode.BICUBIC
    evaluate = [transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(SIZE)]
    paths: Any = sorted(directory.glob("*.jpg"))

    def batches(split: str, uint8: bool) -> Iterator[np.ndarray]:
        last = [transforms.PILToTensor()] if uint8 else normalised
        chain = transforms.Compose([*(train if split == "train" else evaluate), *last])
        images: Any = TorchImages(paths, chain)
        loader: Any = torch.utils.data.DataLoader(
            images,
            batch_size=arguments.batch,
            shuffle=split == "train",
            num_workers=arguments.workers or len(os.sched_getaffinity(0)),
            drop_last=split == "train",
            persistent_workers=True,
            multiprocessing_context="fork",
        )
        while True:
            for batch in loader:
                yield batch.permute(0, 2, 3, 1).numpy()
            if split != "train":
                return

    return batches


class TorchImages:
    """A map-style dataset of image files."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Any]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with self.paths[index].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def _declare_operators(torch: Any) -> None:
    """Declares torchvision's operators, whose library may need CUDA; Pillow's path calls none of them."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.define(f"_{name}_backward(Tensor x) -> Tensor")
    for name in ("nms", "qnms", "qroi_align"):
        library.define(f"{name}(Tensor x) -> Tensor")
    _LIBRARIES.append(library)


class Worker:
    """A process that makes batches when asked."""

    def __init__(self, context: Any, make: Any, directory: Path, arguments: argparse.Namespace) -> None:
        self._pipe, theirs = context.Pipe()
        self._count = arguments.measured
        self._process = context.Process(target=_serve, args=(theirs, make, directory, arguments))
        self._process.start()

    def digest(self) -> str:
        """Returns the SHA-256 of the first evaluation batch."""
        return self._ask(("digest", "validation"))

    def images_per_second(self, split: str) -> float:
        """Returns the speed over the measured images."""
        return self._ask(("measure", split))

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()

    def _ask(self, request: tuple[str, str]) -> Any:
        self._pipe.send(request)
        return self._pipe.recv()


def _serve(pipe: Connection, make: Any, directory: Path, arguments: argparse.Namespace) -> None:
    import hashlib

    batches: Batches = make(directory, arguments)
    while (request := pipe.recv()) is not None:
        command, split = request
        source = batches(split, arguments.uint8)
        if command == "digest":
            content = np.ascontiguousarray(next(source))
            pipe.send(hashlib.sha256(content.tobytes()).hexdigest())
        else:
            pipe.send(_speed(source, arguments.measured))
        del source


def _speed(source: Iterator[np.ndarray], count: int) -> float:
    for _ in range(WARM_UP):
        next(source)
    seen, start = 0, time.perf_counter()
    for images in source:
        seen += len(images)
        if seen >= count:
            break
    return seen / (time.perf_counter() - start)


def _compare(digests: list[str]) -> None:
    if len(set(digests)) != 1:
        raise SystemExit("error: the evaluation batches of the two sides differ")


def _print(speeds: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    versions = _versions(list(speeds))
    print(f"python {platform.python_version()}, {cores} cores, batches of {arguments.batch}, {versions}")
    for kind in SPLITS.values():
        cells = []
        for side, rounds in speeds.items():
            values = rounds[kind]
            cells.append(f"{side} {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})")
        line = f"{kind:<11} images/s: {', '.join(cells)}"
        if "torchvision" in speeds:
            pairs = zip(speeds["bvit_jax"][kind], speeds["torchvision"][kind], strict=True)
            line += f", ratio {statistics.median(a / b for a, b in pairs):.2f}"
        print(line)
    per_core = statistics.median(speeds["bvit_jax"]["training"]) / cores
    needed = arguments.step / per_core
    print(f"per core {per_core:.0f} images/s: {arguments.step:.0f} images/s need {needed:.0f} cores")
    if arguments.json:
        arguments.json.write_text(json.dumps(speeds, indent=2) + "\n")


def _versions(sides: list[str]) -> str:
    from importlib.metadata import version

    names = ["pillow", "grain", *(["torch", "torchvision"] if "torchvision" in sides else [])]
    return ", ".join(f"{name} {version(name)}" for name in names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1280, help="different images (1280)")
    parser.add_argument("--measured", type=int, default=1024, help="images of a round (1024)")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--workers", type=int, default=0, help="threads or workers (0: one a core)")
    parser.add_argument("--uint8", action="store_true", help="without normalisation, on both sides")
    parser.add_argument("--deit", action="store_true", help="train with DeiT's augmentation; with --alone")
    parser.add_argument("--alone", action="store_true", help="without torchvision")
    parser.add_argument(
        "--step", type=float, default=STEP_IMAGES_PER_SECOND, help="images/s that a machine trains"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
