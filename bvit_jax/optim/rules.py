"""Rules that give parameters at matching paths their own learning rate and weight decay."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

from bvit_jax.errors import UserError

KEY = "config.optim.rules"
RULE = "(regular expression, factor of the learning rate, factor of the weight decay)"
NUM_NEAREST = 3


@dataclass(frozen=True)
class Rule:
    """Factors for the parameters whose whole path matches a regular expression.

    Attributes:
      pattern: the expression, for paths such as ``block0/attention/query/dense/kernel``.
      rate, decay: factors of the learning rate and of the weight decay.
    """

    pattern: str
    rate: float
    decay: float

    def matches(self, path: str) -> bool:
        """Returns whether the rule applies to a path, if no earlier one does."""
        return re.fullmatch(self.pattern, path) is not None


def parse_rules(values: Any) -> tuple[Rule, ...]:
    """Returns the rules of a configuration.

    Raises:
      UserError: one is not a triple, its expression is invalid, or a factor is negative or not finite.
    """
    if not isinstance(values, tuple | list):
        raise UserError(f"{KEY} is {values!r}; expected a tuple of rules, each of which is {RULE}")
    return tuple(_parse(i, value) for i, value in enumerate(values))


def _parse(index: int, value: Any) -> Rule:
    name = f"{KEY}[{index}] is {value!r}"
    if not isinstance(value, tuple | list) or len(value) != 3 or not isinstance(value[0], str):
        raise UserError(f"{name}; expected {RULE}")
    try:
        re.compile(value[0])
    except re.error as error:
        raise UserError(f"{name}, which is not a regular expression: {error}; expected {RULE}") from error
    for factor in value[1:]:
        if type(factor) not in (int, float) or not (math.isfinite(factor) and factor >= 0):
            raise UserError(f"{name}, with the factor {factor!r}; expected a number of at least 0")
    return Rule(*value)


def factors(rules: tuple[Rule, ...], params: Any) -> tuple[Any, Any]:
    """Returns two trees like ``params``: the factors of the learning rate and of the weight decay.

    Both are 1 where no rule matches; where several match, the first counts.

    Raises:
      UserError: a rule matches no parameter, or none that earlier rules leave.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    chosen = [next((rule for rule in rules if rule.matches(path)), None) for path in paths]
    for i, rule in enumerate(rules):
        if not any(used is rule for used in chosen):
            raise UserError(f"{KEY}[{i}] {_why_unused(rule, paths)}")
    rates = [rule.rate if rule else 1.0 for rule in chosen]
    decays = [rule.decay if rule else 1.0 for rule in chosen]
    structure = jax.tree.structure(params)
    return jax.tree.unflatten(structure, rates), jax.tree.unflatten(structure, decays)


def _why_unused(rule: Rule, paths: Iterable[str]) -> str:
    if any(rule.matches(path) for path in paths):
        return f"({rule.pattern!r}) matches only what earlier rules match; move it up or leave it out"
    inside = [path for path in paths if re.search(rule.pattern, path)]
    if inside:
        hint = f"it must match a whole path, such as {inside[0]}: try {f'.*{rule.pattern}.*'!r}"
    else:
        near = difflib.get_close_matches(rule.pattern, paths, n=NUM_NEAREST, cutoff=0.0)
        hint = f"the nearest are {', '.join(near)}"
    return f"({rule.pattern!r}) matches no parameter; {hint}"
