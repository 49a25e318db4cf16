"""The precision of products of float32 numbers on devices whose fast units round these first."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DEFAULT = "default"  # JAX's own, or that of the environment


def precise(precision: str) -> AbstractContextManager[object]:
    """Gives the products that are traced inside a precision; `DEFAULT` leaves everything as it is."""
    return contextlib.nullcontext() if precision == DEFAULT else jax.default_matmul_precision(precision)


def at_precision(precision: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Returns a function whose products, once it is traced, have a precision."""
    if precision == DEFAULT:
        return function

    def traced(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        with precise(precision):
            return function(*arguments, **named)

    return traced
