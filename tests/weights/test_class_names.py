"""How the classes of a data set are found among a model's."""

import pytest

from bvit_jax.errors import UserError
from bvit_jax.weights.class_names import default_class_names, imagenet_classes, matched

DIGITS = [str(i) for i in range(10)]
SYNSETS, WORDS = list(imagenet_classes()), list(imagenet_classes().values())


@pytest.mark.parametrize(
    ("names", "known", "how", "expected"),
    [
        (DIGITS, DIGITS, "same", range(10)),
        (DIGITS, default_class_names(10), "same", range(10)),  # nobody named them
        (SYNSETS, WORDS, "same", range(1000)),  # of which two occur twice
        (DIGITS[::-1], DIGITS, "order", range(10)),
        (["7", "3"], DIGITS, "subset", [7, 3]),
        ([SYNSETS[998], SYNSETS[1]], WORDS, "subset", [998, 1]),  # as ImageNet-A and -R
        (sorted(map(str, range(1000))), WORDS, "numbers", sorted(range(1000), key=str)),  # as ImageNet-V2
    ],
)
def test_classes_are_found(names, known, how, expected):
    assert matched(names, known, how) == tuple(expected)


@pytest.mark.parametrize(
    ("names", "how", "message"),
    [
        (
            ["0", "2", "1", *DIGITS[3:]],
            "same",
            "class 1 of the data set is '2' and of the model '1'; use the",
        ),
        (DIGITS[:3], "same", "the data set has 3 classes, first '0', and the model 10; use the data"),
        (DIGITS[:3], "order", "the data set has 3 classes"),
        (["0", "ten"], "subset", "the data set has the class 'ten', which 0 of the model's 10 classes are"),
        (["0", "10"], "numbers", "the data set has the class 'number 10', which 0 of"),
    ],
)
def test_the_first_class_that_differs_is_named(names, how, message):
    with pytest.raises(UserError, match=message):
        matched(names, DIGITS, how)
