"""The kinds of values that settings have: what is accepted, and how a message says it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Values:
    """The values that a setting may have.

    Attributes:
      expected: what they are, as it follows "expected" in a message.
      accept: returns whether a value is one of them.
      choices: all of them, where they have names.
    """

    expected: str
    accept: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) is not bool and issubclass(type(value), Real) and -math.inf < value < math.inf


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, tuple | list) and len(values) == count and all(map(_is_number, values))


def _are_ascending(values: Any) -> bool:
    return _are_numbers(values, 2) and values[0] < values[1]


def _are_blocks(values: Any) -> bool:
    return (
        isinstance(values, tuple | list)
        and all(_is_whole(value) and value >= 0 for value in values)
        and len(set(values)) == len(values)
    )


def one_of(*choices: str) -> Values:
    return Values(f"one of {', '.join(choices)}", choices.__contains__, choices)


def whole(at_least: int) -> Values:
    """Returns whole numbers that also fit the counters of JAX."""
    return Values(
        f"a whole number of at least {at_least}, below 2^31",
        lambda x: _is_whole(x) and at_least <= x < 1 << 31,
    )


FLAG = Values("True or False", lambda x: isinstance(x, bool))
AUTO_FLAG = Values("auto, True or False", lambda x: x == "auto" or isinstance(x, bool))
TEXT = Values("text", lambda x: isinstance(x, str))
POSITIVE = Values("a number above 0", lambda x: _is_number(x) and x > 0)
NOT_NEGATIVE = Values("a number of at least 0", lambda x: _is_number(x) and x >= 0)
FRACTION = Values("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1)
SEED = Values("a whole number from 0 to 4294967295", lambda x: _is_whole(x) and 0 <= x < 2**32)
DECAY = Values(
    "a number from 0 to below 1, since 1 would keep the initial weights",
    lambda x: _is_number(x) and 0 <= x < 1,
)
BELOW_ONE = Values("a number from 0 to below 1", lambda x: _is_number(x) and 0 <= x < 1)
PROFILE_STEPS = Values(
    "() or two ascending whole numbers from 1, such as (10, 15)",
    lambda x: x in ((), []) or (_are_ascending(x) and all(map(_is_whole, x)) and x[0] >= 1),
)
MEANS = Values(
    "three numbers from 0 to 1, of pixels from 0 to 1",
    lambda x: _are_numbers(x, 3) and min(x) >= 0 and max(x) <= 1,
)
STDS = Values(
    "three numbers above 0 and at most 1, of pixels from 0 to 1",
    lambda x: _are_numbers(x, 3) and min(x) > 0 and max(x) <= 1,
)
CROP_SCALE = Values(
    "two ascending numbers above 0, at most 1", lambda x: _are_numbers(x, 2) and 0 < x[0] <= x[1] <= 1
)
CROP_RATIO = Values("two ascending numbers above 0", lambda x: _are_numbers(x, 2) and 0 < x[0] <= x[1])
COLOR_JITTER = Values(
    "brightness, contrast and saturation of at least 0 and a hue from 0 to 0.5",
    lambda x: any(_are_numbers(x, n) for n in (1, 2, 3, 4)) and min(x) >= 0 and max(x[3:], default=0) <= 0.5,
)
CUTMIX_MINMAX = Values(
    "() or two ascending numbers from 0 to 1",
    lambda x: x in ((), []) or (_are_ascending(x) and x[0] >= 0 and x[1] <= 1),
)
RULES = Values(
    "a tuple of rules (regular expression, factor of the learning rate, factor of the weight decay)",
    lambda x: isinstance(x, tuple | list),
)
BLOCKS = Values("() or different whole numbers from 0, such as (0, 5, 11)", _are_blocks)
