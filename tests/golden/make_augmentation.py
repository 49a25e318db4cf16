"""Writes augmentation.npz: what timm and torchvision compute, for tests that run without them.

    python tests/golden/make_augmentation.py

Needs timm, torch and torchvision; the file was made with timm 1.0.29.dev0, torchvision 0.29.2 and
Pillow 13.0.0.
"""

import hashlib
import io
import random
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, mixup, random_erasing
from torchvision.transforms import _functional_pil as functional

from bvit_jax.data.randaugment import OPERATIONS

HERE = Path(__file__).parent
FILL = (124, 116, 104)
RESAMPLES = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
MAGNITUDES = (0.0, 1.3, 2.5, 4.2, 5.0, 6.6, 7.9, 8.5, 9.0, 9.37, 9.81, 10.0, 14.5)
FACTORS = (0.0, 0.31, 0.6, 0.999, 1.0, 1.4, 1.83)
TURNS = (-0.5, -0.21, -0.003, 0.0, 0.004, 0.1, 0.37, 0.5)
QUANTILES = np.linspace(0.02, 0.98, 49)
SHAPE = (3, 18, 14)  # of mixed images
RECIPE = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def main() -> int:
    """Runs the command; returns its exit status."""
    with np.load(HERE.parent / "data" / "transforms.npz") as photos:
        photo = Image.open(io.BytesIO(photos["4/jpeg"].tobytes())).convert("RGB").resize((40, 48))
    arrays = {"image": np.asarray(photo), "magnitudes": np.array(MAGNITUDES), "share": QUANTILES}
    arrays |= {"factors": np.array(FACTORS), "turns": np.array(TURNS)}
    with mock.patch.object(ImageOps, "posterize", posterize):
        arrays |= operations(photo) | policy(photo)
    arrays |= jitters(photo) | mixes() | boxes() | erasing()
    np.savez_compressed(HERE / "augmentation.npz", **arrays)
    return 0


def digest(image: Image.Image) -> np.ndarray:
    """Returns eight bytes of a hash of the pixels."""
    return np.frombuffer(hashlib.sha256(np.asarray(image).tobytes()).digest()[:8], np.uint8)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Pillow's function as it was before version 13: no bits make the image black."""
    return image.point([value & ~(2 ** (8 - bits) - 1) for value in range(256)] * 3)


def operations(photo: Image.Image) -> dict[str, np.ndarray]:
    """Hashes of every operation: [resample, magnitude, sign, 8]."""
    found = {}
    for name in OPERATIONS:
        rows = [
            digest(_operation(name, magnitude, negative, resample, photo))
            for resample in RESAMPLES
            for magnitude in MAGNITUDES
            for negative in (False, True)
        ]
        found[f"operation/{name}"] = np.array(rows).reshape(2, len(MAGNITUDES), 2, 8)
    return found


def _operation(
    name: str, magnitude: float, negative: bool, resample: Image.Resampling, photo: Image.Image
) -> Image.Image:
    hparams = {"img_mean": FILL, "interpolation": resample, "magnitude_max": 30}
    operation = auto_augment.AugmentOp(name, 1.0, magnitude, hparams)
    with mock.patch.object(random, "random", return_value=0.9 if negative else 0.1):
        return operation(photo)


def jitters(photo: Image.Image) -> dict[str, np.ndarray]:
    """Hashes of torchvision's four changes of colour."""
    changes = {
        "brightness": (functional.adjust_brightness, FACTORS),
        "contrast": (functional.adjust_contrast, FACTORS),
        "saturation": (functional.adjust_saturation, FACTORS),
        "hue": (functional.adjust_hue, TURNS),
    }
    return {
        f"jitter/{name}": np.array([digest(change(photo, value)) for value in values])
        for name, (change, values) in changes.items()
    }


def policy(photo: Image.Image) -> dict[str, np.ndarray]:
    """Quantiles of how far DeiT's policy changes the image."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    hparams = {"img_mean": FILL, "interpolation": RESAMPLES[1]}
    augment = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", hparams)
    pixels, changes = np.asarray(photo, np.float32), []
    for _ in range(20_000):
        changes.append(np.abs(np.asarray(augment(photo), np.float32) - pixels).mean())
    return {"policy/change": np.quantile(changes, QUANTILES)}


def mixes() -> dict[str, np.ndarray]:
    """Whole batches, with what was drawn for them, and quantiles of the labels' shares."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, *SHAPE)).astype(np.uint8)
    labels = rng.integers(0, 5, 6)
    found = {"mix/images": images, "mix/labels": labels}
    recipes = {
        "mixup": {"mixup_alpha": 0.8},
        "cutmix": {"cutmix_alpha": 1.0},
        "uncorrected": {"cutmix_alpha": 1.0, "correct_lam": False},
        "minmax": {"cutmix_minmax": (0.2, 0.8), "mixup_alpha": 0.8},
        "both": {**RECIPE, "prob": 0.8},
    }
    for seed, (name, recipe) in enumerate(recipes.items()):
        for mode in ("batch", "pair", "elem"):
            recipe = {"mixup_alpha": 0.0, **recipe}
            for key, value in _mixed_batch(seed, mode, recipe, images, labels).items():
                found[f"mix/{name}/{mode}/{key}"] = value
    for name, recipe in recipes.items():
        np.random.seed(0)  # noqa: NPY002
        mixer = mixup.Mixup(mode="elem", num_classes=2, **{"mixup_alpha": 0.0, **recipe})
        lam = [mixer._mix_elem(torch.zeros(500, 3, 64, 48)).numpy()[:, 0] for _ in range(40)]
        found[f"mix/{name}/lam"] = np.quantile(np.concatenate(lam), QUANTILES)
    return found


def _mixed_batch(
    seed: int, mode: str, recipe: dict, images: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    np.random.seed(seed)  # noqa: NPY002
    mixer = mixup.Mixup(mode=mode, num_classes=5, label_smoothing=0.1, **recipe)
    drawn: list = []
    boxes: list = []
    with (
        _recorded(mixer, "_params_per_batch", drawn),
        _recorded(mixer, "_params_per_elem", drawn),
        _recorded(mixup, "cutmix_bbox_and_lam", boxes),
    ):
        mixed, targets = mixer(torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels))
    lam, use_cutmix = (np.atleast_1d(value).copy() for value in drawn[0])
    use_cutmix = use_cutmix & (lam != 1)
    box = np.zeros((len(lam), 4), np.int32)
    box[use_cutmix] = np.array([box for box, _ in boxes]).reshape(-1, 4)
    lam[use_cutmix] = [lam for _, lam in boxes]
    return {
        "lam": lam.astype(np.float32),
        "use_cutmix": use_cutmix,
        "box": box,
        "mixed": mixed.numpy(),
        "targets": targets.numpy(),
    }


def _recorded(owner: object, name: str, results: list) -> mock._patch:
    original = getattr(owner, name)

    def call(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        # Copied, because the caller changes what it received.
        results.append(tuple(np.copy(v) if isinstance(v, np.ndarray) else v for v in result))
        return result

    return mock.patch.object(owner, name, call)


def boxes() -> dict[str, np.ndarray]:
    """The boxes of cutmix for given shares and centres."""
    rng = np.random.default_rng(0)
    lam = rng.random(400).astype(np.float32)
    centres = np.stack([rng.integers(0, 33, 400), rng.integers(0, 57, 400)], axis=-1)
    found = []
    for share, centre in zip(lam, centres, strict=True):
        with mock.patch.object(np.random, "randint", mock.Mock(side_effect=centre.tolist())):
            top, bottom, left, right = mixup.rand_bbox((3, 33, 57), share)
        found.append((top, bottom, left, right))
    return {"box/lam": lam, "box/centre": centres, "box/box": np.array(found)}


class Erased:
    """An image that remembers what was assigned to it."""

    def __init__(self) -> None:
        self.where: tuple[slice, ...] | None = None

    def __setitem__(self, where: tuple[slice, ...], value: object) -> None:
        self.where = where[1:]


def erasing() -> dict[str, np.ndarray]:
    """Boxes for given candidates, and quantiles of random ones."""
    random.seed(0)
    found: dict[str, np.ndarray] = {}
    height, width = 64, 48
    shares, aspects, boxes = [], [], []
    eraser = random_erasing.RandomErasing(1.0, mode="const", device="cpu")
    for _ in range(200):
        drawn: list[float] = []
        draw = random.uniform

        def uniform(low: float, high: float, drawn: list[float] = drawn, draw: object = draw) -> float:
            drawn.append(draw(low, high))  # type: ignore[operator]
            return drawn[-1]

        image = Erased()
        with mock.patch.object(random, "uniform", uniform):
            eraser._erase(image, 3, 33, 57, torch.float32)
        shares.append((drawn[0::2] + [0.5] * 10)[:10])
        aspects.append((np.exp(drawn[1::2]).tolist() + [1.0] * 10)[:10])
        boxes.append([edge for side in image.where or () for edge in (side.start, side.stop)])
    found["erase/areas"], found["erase/aspects"] = np.array(shares), np.array(aspects)
    found["erase/boxes"] = np.array(boxes)

    eraser, kept = random_erasing.RandomErasing(0.25, mode="const", device="cpu"), 0
    sizes = []
    while len(sizes) < 20_000:
        image = Erased()
        eraser._erase(image, 3, height, width, torch.float32)
        if image.where is None:
            kept += 1
        else:
            rows, columns = image.where
            sizes.append((rows.start, rows.stop, columns.start, columns.stop))
    top, bottom, left, right = np.array(sizes).T
    for name, values in {
        "top": top,
        "bottom": bottom,
        "left": left,
        "right": right,
        "area": (bottom - top) * (right - left),
        "log_aspect": np.log((bottom - top) / (right - left)),
    }.items():
        found[f"erase/{name}"] = np.quantile(values, QUANTILES)
    found["erase/erased"] = np.array(len(sizes) / (len(sizes) + kept))
    return found


if __name__ == "__main__":
    sys.exit(main())
