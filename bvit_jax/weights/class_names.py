"""Human-readable names of classes."""

import functools
from collections.abc import Sequence
from importlib import resources


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """Returns the words for each WordNet synset of ImageNet-1k, in the order of its classes."""
    table = resources.files("bvit_jax") / "assets" / "imagenet_classes.tsv"
    lines = table.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def default_class_names(num_classes: int) -> tuple[str, ...]:
    """Returns ImageNet's names for 1,000 classes, otherwise ``class 0``, ``class 1`` and so on."""
    words = imagenet_classes()
    if num_classes == len(words):
        return tuple(words.values())
    return tuple(f"class {i}" for i in range(num_classes))


def readable_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names with ImageNet's synsets replaced by words."""
    return tuple(imagenet_classes().get(name, name) for name in names)
