"""Golden files from a user's checkout of the PyTorch reference, run in its own environment."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bvit_jax.config import IMAGENET_MEAN, IMAGENET_STD
from bvit_jax.errors import UserError
from bvit_jax.parity.codes import code_of
from bvit_jax.weights import tensor_files

PROGRAM = Path(__file__).with_name("torch_side")
DEFAULT_BATCH = 2


def dump(
    out: Path,
    repo: Path,
    *,
    python: str = sys.executable,
    model: str | None = None,
    checkpoint: Path | None = None,
    images: Sequence[Path] = (),
    batch: int | None = None,
    seed: int = 0,
    compact: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Runs the PyTorch code and writes what it computes as the golden file ``out``.

    Args:
      out: the file, which must not exist and appears complete or not at all.
      repo: checkout of one of `bvit_jax.parity.codes.CODES`.
      python: interpreter with the modules that the checkout needs.
      model: one of our configurations; by default what the checkpoint's arguments say.
      checkpoint: weights; without it, random ones.
      images: files for the evaluation transform of the reference; without them, random images.
      batch: number of random images.
      seed: for everything random.
      compact: whether to compress, and to store large outputs in float32.
      overrides: values that replace arguments of the PyTorch code or entries of its config.json.

    Raises:
      UserError: a path or a file is wrong, or the PyTorch code refuses or fails.
    """
    code = code_of(repo)
    _check_paths(out, checkpoint)
    _check_batch(batch, images)
    if model is None and checkpoint is None:
        raise UserError("neither --model nor --checkpoint is given; pass one of them")
    # In the directory of the target, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        scratch = Path(name)
        request = {
            "code": code.name,
            "repo": str(repo.resolve()),
            "settings": code.settings(model) if model is not None else None,
            "overrides": dict(overrides or {}),
            "checkpoint": str(checkpoint) if checkpoint is not None else None,
            "images": None,
            "batch": batch or DEFAULT_BATCH,
            "seed": seed,
            "compact": compact,
            "out": str(scratch / "golden.npz"),
        }
        if images:
            size = _image_size(_run(python, "describe", request, scratch), python)
            request["images"] = str(scratch / "images.npy")
            np.save(scratch / "images.npy", load_images(images, size))
        _run(python, "dump", request, scratch)
        written = scratch / "golden.npz"
        if not written.is_file():
            raise UserError(f"{python} wrote no file; is it a Python interpreter?")
        written.rename(out)


def _check_paths(out: Path, checkpoint: Path | None) -> None:
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"--checkpoint is {checkpoint}, which is not a file; expected a .pth file")
    if checkpoint is not None:
        tensor_files.check_torch(checkpoint)
    if out.exists():
        raise UserError(f"{out} exists; remove it or write to another file")
    if not out.parent.is_dir():
        raise UserError(f"no directory {out.parent} to write {out.name} in; create it first")


def _check_batch(batch: int | None, images: Sequence[Path]) -> None:
    if batch is not None and batch < 1:
        raise UserError(f"--batch is {batch}; expected at least 1")
    if images and batch not in (None, len(images)):
        raise UserError(f"--batch is {batch}, but there are {len(images)} --images; leave --batch out")


def _image_size(description: str, python: str) -> int:
    try:
        return int(json.loads(description)["image_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{python} wrote no description of the model; is it a Python interpreter?") from error


def load_images(paths: Sequence[Path], size: int) -> np.ndarray:
    """Returns image files as the reference evaluates them: float32 (batch, 3, size, size).

    Raises:
      UserError: a file is missing or is not an image.
    """
    return np.stack([_load_image(path, size) for path in paths])


def _load_image(path: Path, size: int) -> np.ndarray:
    from bvit_jax.data import images, transforms  # whose package needs more than parity does

    try:
        image = images.decode(images.read(path))
    except images.ImageError as error:
        raise UserError(f"--images: cannot use {path}: {error}; expected a JPEG or PNG file") from error
    # The short side is 256 pixels for a crop of 224, and in proportion for other sizes.
    pixels = transforms.eval_transform(image, size=size, resize=256 * size // 224, interpolation="bicubic")
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)


def _run(python: str, command: str, request: Mapping[str, Any], scratch: Path) -> str:
    """Runs the program on the PyTorch side and returns its stdout.

    Raises:
      UserError: it fails; the message is the last line of its stderr.
    """
    path = scratch / "request.json"
    path.write_text(json.dumps(request))
    # Nothing is written into the checkout.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(
            [python, str(PROGRAM), command, str(path)],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        raise UserError(f"cannot run --python {python}: {error.strerror}") from error
    if result.returncode < 0:
        raise UserError(
            f"the PyTorch side was ended by signal {-result.returncode}; did it run out of memory? "
            "try a smaller --batch"
        )
    if result.returncode != 0:
        raise UserError(_last_line(result.stderr, result.returncode))
    return result.stdout


def _last_line(stderr: str, status: int) -> str:
    lines = stderr.strip().splitlines() or [f"no message, exit status {status}"]
    if lines[-1].startswith("error: "):
        return lines[-1].removeprefix("error: ")
    return f"the PyTorch side failed: {lines[-1]}"
