"""The codes that the program runs, by the names in `bvit_jax.parity.codes`."""

from __future__ import annotations

from .bhvit import SETTINGS as BHVIT_ARGS
from .bhvit import BHViT
from .binaryvit import SETTINGS as BINARYVIT_ARGS
from .binaryvit import BinaryViT
from .bivit import BiViT
from .subject import Subject

CODES: dict[str, type[Subject]] = {"binaryvit": BinaryViT, "bhvit": BHViT, "bivit": BiViT}
# What a checkpoint's args must hold.
ARGS = {"binaryvit": BINARYVIT_ARGS, "bhvit": BHVIT_ARGS, "bivit": ("model", "input_size", "nb_classes")}
