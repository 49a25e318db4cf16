import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from bvit_jax import data
from bvit_jax.config import default_config

GOLDEN = Path(__file__).parent / "transforms.npz"


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """JPEG photographs of several sizes, and a split with one damaged file."""

    VERSION = tfds.core.Version("2.1.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "file_name": tfds.features.Text(),  # as in ImageNet
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="For tests.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        with np.load(GOLDEN) as golden:
            photos = [golden[f"{index}/jpeg"].tobytes() for index in range(6)]
        buffer = io.BytesIO()
        Image.new("CMYK", (60, 40), (10, 20, 30, 40)).save(buffer, "jpeg")
        return {
            "train": self._generate_examples(photos),
            "odd": self._generate_examples([buffer.getvalue()]),
            "damaged": self._generate_examples([photos[4], photos[4][:2000], b"not an image"]),
        }

    def _generate_examples(self, files: list[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, encoded in enumerate(files):
            example = {"image": encoded, "label": index % 2, "file_name": f"{index}.jpeg"}
            yield index, example


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What torchvision computed: JPEG files, crops of them, quantiles of random boxes."""
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A TFDS directory with the datasets digits and photos."""
    path = str(tmp_path_factory.mktemp("tfds"))
    data.open_split("digits", path, "train")
    Photos(data_dir=path).download_and_prepare(file_format="array_record")
    return path


@pytest.fixture
def make_config(data_dir: str) -> Callable[..., ConfigDict]:
    """Returns the ``data`` settings for digits, with the given changes."""

    def make(**changes: Any) -> ConfigDict:
        config = default_config().data
        config.update(dataset="digits", data_dir=data_dir, eval_split="test", eval_resize=16)
        config.update(num_threads=2, prefetch=8)
        config.update(changes)
        return config

    return make
