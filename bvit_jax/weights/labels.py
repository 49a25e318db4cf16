"""Names of classes that people can read."""

import functools
from collections.abc import Sequence
from importlib import resources


@functools.cache
def imagenet() -> dict[str, str]:
    """Returns the WordNet synset of each ImageNet-1k class, in their order, and its words."""
    table = resources.files("bvit_jax") / "assets" / "imagenet_classes.tsv"
    lines = table.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def default_names(num_classes: int) -> tuple[str, ...]:
    """Returns ImageNet's names for 1,000 classes, else ``class 0`` and so on."""
    words = imagenet()
    if num_classes == len(words):
        return tuple(words.values())
    return tuple(f"class {i}" for i in range(num_classes))


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names with words in place of ImageNet's synsets."""
    return tuple(imagenet().get(name, name) for name in names)
