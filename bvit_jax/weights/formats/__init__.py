"""The file formats: how each names arrays, recognises its files and describes a model.

A format is one module with a ``FORMAT``, listed here. Formats know the configurations of our models, but
neither files nor variables: `bvit_jax.weights.loading` and `saving` move the arrays.
"""

from bvit_jax.weights.formats import bhvit, bivit, huggingface, reference, timm
from bvit_jax.weights.formats.base import Format, Interpretation

__all__ = ["FORMATS", "Format", "Interpretation"]

# In the order in which they are tried: a directory of Hugging Face's ViT before the bare names, which
# the reference shares, and Bi-ViT's before those of its backbones.
FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        huggingface.FORMAT,
        bhvit.FORMAT,
        reference.FORMAT,
        bivit.FORMAT,
        timm.FORMAT,
        timm.MICROSOFT_FORMAT,
    )
}
