"""BinaryViT's ablation (table 3 of the paper) at matched size, on drawings.

Command: bvit ablate icons --dir DIR --set data.data_dir=DATA --set teacher.path=EXPORTED
  where DATA and EXPORTED are those of configs/icons.py.
Expected: 14.4, 30.8, 31.8, 38.7, 56.9 and 56.8 % top-1, three seeds; see docs/results.md.
Hardware and cost: 4 minutes a run, 18 runs, on two cores of an Intel Xeon with AVX-512.
"""

from bvit_jax.ablation import Study
from bvit_jax.configs import icons

ROWS = {
    "ReActNet-DeiT": "cls",
    "+ average pooling": "avg_pool",
    "+ pooling branches": "multi_branch",
    "+ LayerScale": "ls",
    "pyramid (BinaryViT)": "binaryvit",
    "real patch embeddings": "some_fp",
}


def get_study() -> Study:
    """Returns the study."""
    rows = {row: icons.get_config(model) for row, model in ROWS.items()}
    for config in rows.values():
        config.health = False
        config.packed = "off"  # small layers gain nothing from it
        config.eval_every_epochs = 2
    return Study("BinaryViT's ablation on icons", rows)
