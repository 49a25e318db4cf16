"""How close steps come to the ceilings of their machine and to their floor."""

import statistics
from typing import Any

from benchmarks.floor import bandwidth, floor, flops, least_bytes, peak
from benchmarks.workload import Kind, Work


def merged(before: dict[str, Any], after: dict[str, Any] | None) -> dict[str, Any]:
    """Returns ceilings with the rounds of both measurements."""
    merged = dict(before)
    for name in ("bytes_per_second", "operations_per_second"):
        of_after = after[name] if after else {}
        merged[name] = {key: rates + of_after.get(key, []) for key, rates in before[name].items()}
    return merged


def add_shares(run: dict[str, Any], ceilings: dict[str, Any] | None) -> None:
    """Adds to each side of a run, as ``achieved``, what its steps reach; see `achieved`."""
    for side in run["sides"].values():
        side["achieved"] = {}
        if run["work"] is None:
            continue
        for kind, speeds in side["images_per_second"].items():
            seconds = run["batch"] / statistics.median(speeds)
            images = run["batch"] // side["devices"]
            side["achieved"][kind] = achieved(Work(**run["work"]), kind, images, side, seconds, ceilings)


def achieved(
    work: Work,
    kind: Kind,
    batch: int,
    side: dict[str, Any],
    seconds: float,
    ceilings: dict[str, Any] | None,
) -> dict[str, float]:
    """Returns the rates of a step that took some seconds, and their shares of the ceilings.

    All are those of one device, of ``batch`` images.

    - ``seconds``: of a step.
    - ``flops``, ``flops_per_second``: by the arithmetic count, `floor.flops`.
    - ``least_bytes``, ``least_bytes_per_second``: by `floor.least_bytes`.
    - ``accessed_bytes_per_second``: by the compiler's program, where the side has one: also what caches hold.
    - with ceilings, ``share_of_flops`` of the ceiling of products in the side's dtype, ``share_of_bytes``
      (accessed, or least without) of the bandwidth, ``floor_seconds`` and ``share_of_floor``, the floor over
      the time taken.
    """
    dtype = side["dtype"]
    count, size = flops(work, kind, batch), least_bytes(work, kind, batch, dtype)
    accessed = side["accessed_bytes"].get(kind)
    found = {
        "seconds": seconds,
        "flops": count,
        "flops_per_second": count / seconds,
        "least_bytes": size,
        "least_bytes_per_second": size / seconds,
    }
    if accessed:
        found["accessed_bytes_per_second"] = accessed / seconds
    if ceilings:
        least = floor(work, kind, batch, dtype, ceilings)
        found["share_of_flops"] = found["flops_per_second"] / peak(ceilings, dtype)
        found["share_of_bytes"] = (accessed or size) / seconds / bandwidth(ceilings)
        found["floor_flops_seconds"] = least.flops_seconds
        found["floor_bytes_seconds"] = least.bytes_seconds
        found["floor_seconds"] = least.seconds
        found["share_of_floor"] = least.seconds / seconds
    return found
