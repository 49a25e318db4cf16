"""Human-readable names of classes."""

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Literal

from bvit_jax.errors import UserError, printable

# How the classes of a data set are found among a model's: all of them in its order; some of them by name; by
# numbers in place of names, such as ImageNet-V2's; or not by their names at all.
Matching = Literal["same", "subset", "numbers", "order"]
ADVICE = (
    "use the data that it was trained on, --classes=subset to find classes by name, --classes=numbers where"
    " names are numbers, or --classes=order to ignore names"
)


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
    """Returns the names with ImageNet's synsets replaced by words, and without escapes for a terminal."""
    return tuple(imagenet_classes().get(name) or printable(name) for name in names)


def matched(
    names: Sequence[str], known: Sequence[str], how: Matching = "same", advice: str = ADVICE
) -> tuple[int, ...]:
    """Returns the number of a model's class for each class of a data set.

    Args:
      names: of the data set.
      known: of the model. Where nobody named them (``class 0``, ...) only their number is compared.
      how: see `Matching`.
      advice: what to do about a difference.

    Raises:
      UserError: a class of the data set is not where ``how`` says; it is the first that differs.
    """
    there, ours = _synsets(names), _synsets(known)
    if how == "numbers":
        there = [ours[int(n)] if n.isdecimal() and int(n) < len(ours) else f"number {n}" for n in there]
    if how in ("subset", "numbers"):
        strange = next((name for name in there if ours.count(name) != 1), None)
        if strange is not None:
            raise UserError(
                f"the data set has the class {_shown(strange)}, which {ours.count(strange)} of the model's"
                f" {len(ours)} classes are; --classes={how} expects one for each"
            )
        return tuple(map(ours.index, there))
    if len(there) != len(ours):
        raise UserError(
            f"the data set has {len(there)} classes, first {_shown(there[0])}, and the model {len(ours)};"
            f" {advice}"
        )
    named = how == "same" and tuple(ours) != default_class_names(len(ours))
    for i, (name, own) in enumerate(zip(there, ours, strict=True)):
        if named and name != own:
            raise UserError(
                f"class {i} of the data set is {_shown(name)} and of the model {_shown(own)}; {advice}"
            )
    return tuple(range(len(ours)))


def _synsets(names: Sequence[str]) -> list[str]:
    """Returns class names as data sets have them: all words of ImageNet are its synsets again."""
    return list(imagenet_classes() if tuple(names) == tuple(imagenet_classes().values()) else names)


def _shown(name: str) -> str:
    words = imagenet_classes().get(name)
    return repr(name) if words is None else f"{name!r} ({words})"
