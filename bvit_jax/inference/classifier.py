"""Classes of images, as a model and its preprocessing see them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax.augment.normalization import Normalization
from bvit_jax.errors import UserError
from bvit_jax.files import any_path
from bvit_jax.inference.engine.network import Network
from bvit_jax.inference.images import Picture, label_of, model_input
from bvit_jax.weights.packed import Packed, is_packed, read_packed
from bvit_jax.weights.preprocessing import Preprocessing

if TYPE_CHECKING:  # a packed model runs without Flax
    from flax import linen as nn

    from bvit_jax.weights import Pretrained

IMAGES_AT_ONCE = 8
NATIVE = "native"  # of `bvit_jax.weights`, which a packed model does without

Images = Sequence[Picture] | np.ndarray


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Classifier:
    """A network with its weights, its preprocessing and the names of its classes.

    Attributes:
      pretrained: what was read, with its history and what its files did not say; or a packed model.
    """

    pretrained: "Pretrained | Packed"

    @property
    def config(self) -> Any:
        """The settings of the model as attributes, as `bvit_jax.model_config` makes them."""
        return self.pretrained.config

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the model's input: resizing, crop, mean and standard deviation."""
        return self.pretrained.preprocessing

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, one each."""
        return self.pretrained.class_names

    @cached_property
    def model(self) -> "nn.Module | Network":
        """The Flax module; ``model.apply(variables, images).logits``, float32 ``[N, classes]``.

        Its input is normalized: float32 ``[N, size, size, 3]``. That of a packed model is the engine's.
        """
        if isinstance(self.pretrained, Packed):
            return Network(self.pretrained.config)
        from bvit_jax import models

        return models.create_model(self.config)

    @cached_property
    def variables(self) -> Mapping[str, Any]:
        """``{"params": ..., "batch_stats": ...}`` on the device; or folded arrays."""
        arrays = self.pretrained.arrays()
        return jax.device_put(self.model.prepare(arrays) if isinstance(self.model, Network) else arrays)

    def predict(self, images: Images) -> np.ndarray:
        """Returns the probabilities of the classes.

        Args:
          images: uint8 ``[N, H, W, 3]``, or a sequence of N images of any sizes: uint8 arrays ``[H, W, 3]``,
            PIL images, or paths of image files. All are resized, cropped and normalized alike, as the
            model's preprocessing says.

        Returns:
          float32 ``[N, classes]``; each row sums to 1.

        Raises:
          UserError: an image cannot be read or has another type, or the model's answer is not finite.
        """
        rows = list(self._probabilities(images))
        return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), np.float32)

    def top(self, images: Images, count: int = 5) -> Iterator[list[Guess]]:
        """Yields the likeliest classes of each image, the likeliest first.

        Args:
          images: see `predict`; files are opened as they are needed.
          count: classes per image.

        Raises:
          UserError: see `predict`.
        """
        for row in self._probabilities(images):
            best = np.argsort(-row, kind="stable")[:count]
            yield [Guess(int(i), self.class_names[i], float(row[i])) for i in best]

    def _probabilities(self, images: Images) -> Iterator[np.ndarray]:
        for start in range(0, len(images), IMAGES_AT_ONCE):
            group = images[start : start + IMAGES_AT_ONCE]
            batch = np.stack([model_input(image, self.preprocessing) for image in group])
            for index, row in enumerate(np.asarray(self.probabilities(batch))):
                if not np.isfinite(row).all():
                    name = label_of(images[start + index], start + index)
                    raise UserError(f"the model's answer for {name} is not finite; its weights are damaged")
                yield row

    def probabilities(self, images: np.ndarray) -> jax.Array:
        """Returns the probabilities of images that are cropped already, uint8 ``[N, size, size, 3]``.

        Args:
          images: the function is compiled for each number of them once.
        """
        found: jax.Array = self._forward(images)
        return found

    @cached_property
    def _forward(self) -> Any:
        """The compiled function from uint8 ``[N, size, size, 3]`` to probabilities ``[N, classes]``."""
        normalize = Normalization(self.preprocessing.mean, self.preprocessing.std)

        def probabilities(variables: Any, images: jax.Array) -> jax.Array:
            output: Any = self.model.apply(variables, normalize(images))
            return jax.nn.softmax(output.logits.astype(jnp.float32))

        if isinstance(self.pretrained, Packed):  # as arguments, a thousand arrays cost a call 1.5 ms
            return jax.jit(partial(probabilities, self.variables))
        return partial(jax.jit(probabilities), self.variables)


def load(
    path: str | os.PathLike[str],
    *,
    checkpoint: Literal["latest", "best"] | None = None,
    ema: bool | None = None,
    **options: Any,
) -> Classifier:
    """Reads a model.

    Args:
      path: the workdir of a run, a converted directory or file, or anything else that ``bvit convert`` reads;
        or what ``bvit export`` wrote.
      checkpoint: which one of a run; the latest if None.
      ema: whether to take the moving average of a run; if None, where it keeps one.
      options: of `bvit_jax.weights.load`, for files that do not describe themselves.

    Raises:
      UserError: there is no such model, or it is damaged.
    """
    path = any_path(str(path))
    if is_packed(path):
        if checkpoint is not None or ema is not None or any(options.values()):
            raise UserError(f"{path} is a packed model, which describes itself; leave out the options")
        return Classifier(checked(read_packed(path), path))
    from bvit_jax.workdir import runs  # here, because Orbax takes seconds to import

    return Classifier(runs.load_model(path, kind=checkpoint, ema=ema, **options))


def checked(model: Packed, path: Path) -> Packed:
    """Returns a packed model; raises `UserError` with its path if its arrays do not fit its settings."""
    try:
        Network(model.config).check(model.arrays())
        if len(model.class_names) != model.config["num_classes"]:
            raise UserError(f"it names {len(model.class_names)} of {model.config['num_classes']} classes")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return model


def save(model: "Classifier | Pretrained", path: str | os.PathLike[str], format: str = NATIVE) -> None:
    """Writes a model as a directory, or as one file if the path ends in ``.safetensors`` or ``.pth``.

    Args:
      model: what `load` returned.
      path: must not exist; appears complete or not at all.
      format: one of those of ``bvit convert``.

    Raises:
      UserError: the path exists or cannot be written, the format cannot hold the model, or it is packed.
    """
    from bvit_jax import weights

    read = model.pretrained if isinstance(model, Classifier) else model
    if isinstance(read, Packed):
        raise UserError("a packed model has no latent weights to save; copy its directory")
    weights.save(read, Path(path).expanduser(), format)


def predict(model: Classifier | str | os.PathLike[str], images: Images) -> np.ndarray:
    """Returns `Classifier.predict` of images, float32 ``[N, classes]``; the model is loaded if it is a path.

    Raises:
      UserError: see `load` and `Classifier.predict`.
    """
    return (model if isinstance(model, Classifier) else load(model)).predict(images)
