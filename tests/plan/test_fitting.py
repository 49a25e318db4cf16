from collections.abc import Callable

import pytest

from bvit_jax.plan.fitting import largest_batch

GIB = 2**30


class Compiler:
    """Pretends to compile: ``memory`` of a batch against a limit."""

    def __init__(self, limit: int, memory: Callable[[int], float]) -> None:
        self.limit, self.memory, self.calls = limit, memory, []

    def __call__(self, batch: int) -> int | None:
        self.calls.append(batch)
        size = int(self.memory(batch))
        return size if size <= self.limit else None


@pytest.mark.parametrize("tell", [True, False])
def test_three_compilations_find_the_answer_where_memory_is_linear(tell: bool) -> None:
    compiler = Compiler(16 * GIB, lambda n: GIB + 0.25 * GIB * n)
    needed = int(compiler.memory(128)) if tell else 0
    assert largest_batch(compiler, compiler.limit, 128, needed) == (56, 15 * GIB)  # 60, in multiples of 8
    assert len(compiler.calls) == 3


def test_an_answer_that_does_not_fit_is_lowered() -> None:
    compiler = Compiler(1000, lambda n: 10 * n if n < 60 else 12 * n)
    batch, size = largest_batch(compiler, 1000, 256, 2560)
    assert size == compiler.memory(batch) <= 1000
    assert batch >= 72


def test_small_batches_are_counted_one_by_one() -> None:
    compiler = Compiler(1000, lambda n: 100 + 150 * n)
    assert largest_batch(compiler, 1000, 64, 9700) == (6, 1000)


def test_not_even_one_image() -> None:
    compiler = Compiler(1000, lambda n: 2000 + n)
    assert largest_batch(compiler, 1000, 64, 2064) == (0, 0)
    assert largest_batch(compiler, 1000, 1, 2001) == (0, 0)


@pytest.mark.parametrize("limit", [700, 1300, 5000, 12345])
@pytest.mark.parametrize("curve", [lambda n: 50 + 3 * n, lambda n: 50 + 2 * n + 0.002 * n * n])
def test_it_always_fits_and_is_near_the_limit(limit: int, curve: Callable[[int], float]) -> None:
    compiler = Compiler(limit, curve)
    batch, size = largest_batch(compiler, limit, 8192)
    assert size == int(curve(batch)) <= limit
    assert curve(batch * 1.3 + 8) > limit
    assert len(compiler.calls) <= 10
