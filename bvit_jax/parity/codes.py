"""The PyTorch codes that ``dump`` can run: how a checkout is recognised, and which models it has.

What runs them, one file for each, is in ``torch_side``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError, nearest

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Code:
    """One PyTorch code.

    Attributes:
      name: of its file in ``torch_side``.
      address: where its checkouts come from.
      files: paths that a checkout has.
      models: its arguments for models that go by the names of our configurations.
    """

    name: str
    address: str
    files: tuple[str, ...]
    models: Mapping[str, Settings]

    def is_checkout(self, repo: Path) -> bool:
        """Returns whether a directory has the files of this code."""
        return all((repo / name).exists() for name in self.files)

    def settings(self, name: str) -> dict[str, Any]:
        """Returns the code's arguments for one of our configurations.

        Raises:
          UserError: the code has no such model.
        """
        if name not in self.models:
            raise UserError(f"--model is {name!r}{nearest(name, self.models)}")
        return dict(self.models[name])


def code_of(repo: Path) -> Code:
    """Returns the code that a directory is a checkout of.

    Raises:
      UserError: it is none.
    """
    for code in CODES:
        if code.is_checkout(repo):
            return code
    addresses = [code.address for code in reversed(CODES)]
    raise UserError(
        f"--repo is {repo}, which has the files of none of the known codes; "
        f"expected a checkout of {', '.join(addresses[:-1])} or {addresses[-1]}"
    )


# --- BinaryViT: a configuration directory, a model type and switches, as in its scripts/*.sh -------

_DEIT_DIRECTORY, _BINARYVIT_DIRECTORY = "deit-small-patch16-224", "binaryvit-small-patch4-224"

# The switches, with the values they have unless a script sets them.
_SWITCHES: dict[str, Any] = {
    "weight_bits": 1,
    "input_bits": 1,
    "nb_classes": 1000,
    "avg_res3": False,
    "avg_res5": False,
    "replace_ln_bn": True,
    "disable_layerscale": False,
    "enable_cls_token": False,
    "some_fp": False,
}
_POOLING = {"avg_res3": True, "avg_res5": True}


def _react_deit(**switches: bool) -> dict[str, Any]:
    return {"model": _DEIT_DIRECTORY, "model_type": "extra-res", **_SWITCHES, **switches}


def _binaryvit(**switches: bool) -> dict[str, Any]:
    return {
        "model": _BINARYVIT_DIRECTORY,
        "model_type": "extra-res-pyramid",
        **_SWITCHES,
        **_POOLING,
        **switches,
    }


BINARYVIT = Code(
    "binaryvit",
    "github.com/Phuoc-Hoan-Le/BinaryViT",
    ("models.py", "configs"),
    {
        "binaryvit_small": _binaryvit(),
        "binaryvit_small:some_fp": _binaryvit(some_fp=True),
        "react_deit_small:cls": _react_deit(enable_cls_token=True, disable_layerscale=True),
        "react_deit_small:avg_pool": _react_deit(disable_layerscale=True),
        "react_deit_small:multi_branch": _react_deit(disable_layerscale=True, **_POOLING),
        "react_deit_small:ls": _react_deit(**_POOLING),
        "deit_small": {
            "model": _DEIT_DIRECTORY,
            "model_type": "deit",
            **_SWITCHES,
            "weight_bits": 32,
            "input_bits": 32,
            "replace_ln_bn": False,
        },
    },
)

# --- BHViT: the same, with its own switches --------------------------------------------------------


def _bhvit(directory: str, **switches: bool) -> dict[str, Any]:
    return {
        "model": directory,
        "model_type": "dbhvit",
        "weight_bits": 1,
        "input_bits": 1,
        "nb_classes": 1000,
        "shift3": True,
        "shift5": True,
        "replace_ln_bn": True,
        "disable_layerscale": False,
        "enable_cls_token": False,
        "gsb": False,
        "recu": False,
        "some_fp": False,
        **switches,
    }


BHVIT = Code(
    "bhvit",
    "github.com/IMRL/BHViT",
    ("models.py", "configs", "transformer/BHViT.py"),
    {
        "bhvit": _bhvit("BHViT"),
        "bhvit:small": _bhvit("BHViT"),
        "bhvit:fp_downsample": _bhvit("BHViT", some_fp=True),
        "bhvit:small,fp_downsample": _bhvit("BHViT", some_fp=True),
        "bhvit:tiny": _bhvit("BHViT_tiny"),
        "bhvit:tiny,fp_downsample": _bhvit("BHViT_tiny", some_fp=True),
    },
)

# --- Bi-ViT: arguments of the classes of its models -------------------------------------------------

_DEIT_TINY = {"img_size": 224, "patch_size": 16, "depth": 12, "num_classes": 1000, "distilled": True} | {
    "embed_dim": 192,
    "num_heads": 3,
}
_DEIT_SMALL = _DEIT_TINY | {"embed_dim": 384, "num_heads": 6}
_SWIN_TINY = {
    "img_size": 224,
    "patch_size": 4,
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "num_classes": 1000,
}

BIVIT = Code(
    "bivit",
    "github.com/YanjingLi0202/Bi-ViT",
    ("bi_vision_transformer.py", "bi_swin_transformer.py", "Bi_Quant.py"),
    {
        "bivit_release_deit": {"case": "bivit_deit", **_DEIT_TINY},
        "bivit_release_deit:tiny": {"case": "bivit_deit", **_DEIT_TINY},
        "bivit_release_deit:small": {"case": "bivit_deit", **_DEIT_SMALL},
        "bivit_release_swin": {"case": "bivit_swin", **_SWIN_TINY},
        "bivit_release_swin:tiny": {"case": "bivit_swin", **_SWIN_TINY},
        "deit_distilled:tiny": {"case": "deit_distilled", **_DEIT_TINY},
        "deit_distilled:small": {"case": "deit_distilled", **_DEIT_SMALL},
        "swin:tiny": {"case": "swin", **_SWIN_TINY},
    },
)

CODES = (BHVIT, BIVIT, BINARYVIT)  # the files of BinaryViT's are among those of BHViT's
