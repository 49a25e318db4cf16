"""Weights on disk: PyTorch's, Hugging Face's and our own files, read and written without loss.

`load` recognises a file's format and returns a `Pretrained`, which `save` writes in any format that can
hold it. May touch files and build models; computes nothing but resized embeddings and new heads.
To follow a checkpoint: `raw_checkpoint` reads files, `formats` interpret them, `naming` and `state_dicts`
rename arrays, `document` carries what PyTorch's files cannot say.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax.weights.formats import FORMATS
    from bvit_jax.weights.loading import load
    from bvit_jax.weights.preprocessing import Preprocessing
    from bvit_jax.weights.pretrained import Pretrained
    from bvit_jax.weights.saving import NATIVE, save, to_format

__all__ = ["FORMATS", "NATIVE", "Preprocessing", "Pretrained", "load", "save", "to_format"]

__getattr__ = lazily(__name__)
