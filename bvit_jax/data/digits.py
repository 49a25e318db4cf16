"""The 1,797 handwritten digits that come with scikit-learn, as a TFDS dataset without a download.

Real images that any machine prepares in a second: the quick start and the end-to-end tests train on them
through the code that reads ImageNet.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

TEST_EVERY = 5  # every fifth image is a test image, starting with the first


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of ``digits``: grey PNG images of 8x8 pixels, and labels 0 to 9.

    Splits: ``test``, the 360 images whose index is a multiple of 5, and ``train``, the other 1,437.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS reads it from the class)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 pixels, as distributed with scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,  # records keep scikit-learn's order
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        is_test = np.arange(len(load_digits().target)) % TEST_EVERY == 0
        return {
            "train": self._generate_examples(np.flatnonzero(~is_test)),
            "test": self._generate_examples(np.flatnonzero(is_test)),
        }

    def _generate_examples(self, indices: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        bunch = load_digits()
        pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        for index in indices:
            # An array would be encoded by TensorFlow; a Pillow image is encoded by Pillow.
            image = Image.fromarray(pixels[index])
            yield int(index), {"image": image, "label": int(bunch.target[index])}


def prepare(data_dir: str) -> None:
    """Writes ``digits`` to ``data_dir`` atomically; several processes may do so at once.

    Raises:
      OSError: the directory cannot be written.
    """
    builder = Digits(data_dir=data_dir)
    try:
        # TFDS announces downloads on stdout and draws progress bars on stderr, though this takes no time.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
    except OSError:
        # TFDS writes elsewhere and renames at the end, which fails if another process was first.
        if not builder.data_path.exists():
            raise
