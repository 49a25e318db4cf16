"""A packed model as one StableHLO program, its weights inside as words, which JAX alone runs.

A directory with ``model.stablehlo``, which ``jax.export.deserialize`` reads, and ``config.json``, which says
how images become its input and what its classes are called. The program takes any number of images, uint8
``[N, size, size, 3]``, and returns their probabilities, float32 ``[N, classes]``, on a CPU, GPU or TPU.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array, export

from bvit_jax.augment.normalization import Normalization
from bvit_jax.errors import UserError
from bvit_jax.files.appearing import appearing, to_json, write
from bvit_jax.inference.engine.families import apply
from bvit_jax.inference.engine.levels import XLA
from bvit_jax.weights.packed import CONFIG_FILE, Packed, described

FORMAT = "bvit_jax_stablehlo"
PROGRAM_FILE = "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def program(model: Packed) -> bytes:
    """Returns the serialised program of a packed model.

    Raises:
      UserError: flatbuffers, which `jax.export` needs, is not installed.
    """
    arrays, normalize = model.arrays(), Normalization(model.preprocessing.mean, model.preprocessing.std)

    def probabilities(image: Array) -> Array:
        return jax.nn.softmax(apply(model.config, arrays, normalize(image[None]), XLA)[0])

    # Image by image: each stays in the caches, and the shapes within are known.
    images = jax.jit(lambda images: jax.lax.map(probabilities, images))
    size = model.config["image_size"]
    shape = export.symbolic_shape(f"images, {size}, {size}, 3")
    exported = export.export(images, platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    try:
        return bytes(exported.serialize())
    except ImportError:
        raise UserError(
            "--format stablehlo needs flatbuffers; install it (pip install flatbuffers)"
        ) from None


def write_program(model: Packed, target: Path, version: str) -> None:
    """Writes a packed model as a directory with its program, which must not exist, whole or not at all.

    Args:
      model: what to write.
      target: the directory.
      version: of this package, for the record.

    Raises:
      UserError: the target exists or cannot be written, or flatbuffers is not installed.
    """
    content = program(model)
    size, classes = model.config["image_size"], len(model.class_names)
    program_of = {
        "format": FORMAT,
        "jax": jax.__version__,
        "input": f"uint8 [N, {size}, {size}, 3]",
        "output": f"probabilities, float32 [N, {classes}]",
    }
    with appearing(target) as partial:
        partial.mkdir()
        write(partial / PROGRAM_FILE, content)
        write(partial / CONFIG_FILE, to_json(program_of | described(model, version)))
