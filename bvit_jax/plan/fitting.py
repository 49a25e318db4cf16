"""The largest batch that fits, found in few compilations."""

from collections.abc import Callable

MULTIPLE = 8  # of images: what the layouts of a TPU pad to
ATTEMPTS = 5


def largest_batch(
    memory_of: Callable[[int], int | None], limit: int, too_many: int, needed: int = 0
) -> tuple[int, int]:
    """Returns the largest batch of a chip that fits, and the bytes that it needs.

    Two small batches give a linear model of the memory, and its answer is tried: each call of
    ``memory_of`` is a compilation, which takes minutes for a large model. Above 8 images, only multiples of
    8 are tried.

    Args:
      memory_of: the bytes that a batch needs, None if it does not fit.
      limit: bytes of a chip.
      too_many: a batch that does not fit.
      needed: bytes that this one needs, 0 where unknown.

    Returns:
      (0, 0) if not even one image fits. A fit is always one that ``memory_of`` confirmed.
    """
    guess = too_many * limit // (2 * needed) if needed else too_many // 4
    high = _rounded(min(max(guess, 1), too_many - 1))
    fits: dict[int, int] = {}
    while high > 0:
        size = memory_of(high)
        if size is not None:
            fits[high] = size
            break
        too_many, high = high, _rounded(high // 2)
    if not fits:
        return 0, 0
    low = _rounded(high // 2)
    if low and low != high:
        fits[low] = memory_of(low) or fits[high]
    ceiling, back = too_many - 1, 16
    for _ in range(ATTEMPTS):
        target = _rounded(min(_extrapolated(fits, limit), ceiling))
        if target <= max(fits):
            break
        size = memory_of(target)
        if size is None:
            ceiling, back = target - max(1, target // back), max(back // 2, 2)
        else:
            fits[target] = size
    best = max(fits)
    return best, fits[best]


def _extrapolated(fits: dict[int, int], limit: int) -> int:
    """Returns where the line through the two largest batches known to fit reaches the limit."""
    batches = sorted(fits)[-2:]
    if len(batches) < 2:
        return 2 * batches[0]
    low, high = batches
    slope = max((fits[high] - fits[low]) / (high - low), 1.0)
    return int(high + (limit - fits[high]) / slope)


def _rounded(batch: int) -> int:
    return batch if batch < MULTIPLE else batch - batch % MULTIPLE
