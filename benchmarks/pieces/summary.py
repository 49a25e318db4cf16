"""What the pieces found, as plain text, and whether the aims are reached."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.floor import format_rate
from benchmarks.shares import add_shares

MIB = 2**20
Found = Mapping[str, Any]
# Of the training step of BinaryViT, each side at its own best batch.
AIMS = {
    "eager": ("faster than eager PyTorch under AMP", 3.0),
    "compiled": ("faster than torch.compile under AMP", 1.3),
    "memory": ("less peak memory of an image than eager PyTorch", 3.0),
    "floor": ("share of the floor", 0.45),
}
SUBJECT = ("binaryvit", 224)  # and images of this size


def add_floors(pieces: list[dict[str, Any]]) -> None:
    """Adds to every measured side what it reaches of the ceilings and of the floor, as `add_shares` does."""
    ceilings = next((p["found"] for p in pieces if "bytes_per_second" in p.get("found", {})), None)
    works = {p["found"]["settings"]["name"]: p["found"]["work"] for p in _sides(pieces) if p["found"]["work"]}
    for piece in _sides(pieces):
        side = piece["found"]
        work = works.get(side["settings"]["name"])  # the PyTorch code's is that of our model
        add_shares({"work": work, "batch": side["batch"], "sides": {"": side}}, ceilings)


def passed(pieces: list[dict[str, Any]]) -> bool:
    """Returns whether no piece failed, except for lack of memory, and every number is as expected."""
    return not any(p["status"] == "failed" or _wrong(p.get("found", {})) for p in pieces)


def _wrong(found: Found) -> bool:
    """Returns whether something was found not to hold."""
    flags = ("passed", "same_metrics", "same_weights", "exact")
    nested = any(_wrong(value) for value in found.values() if isinstance(value, dict))
    return nested or any(found.get(flag) is False for flag in flags)


def table(report: Found) -> str:
    """Returns the report of `benchmarks.accelerator`."""
    pieces = report["pieces"]
    lines = [*_heading(report["device"]), ""]
    for piece in pieces:
        took = f"{piece['seconds']:.0f} of {piece['estimate']} s" if "seconds" in piece else ""
        error = f"{piece['status']}: {piece['error']}" if piece["status"] != "done" else ""
        sides = _sides(pieces) if piece["part"] == "levers" else []
        outcome = "; ".join(filter(None, (_outcome(piece.get("found", {}), sides), error)))
        lines.append(f"{piece['part']:<8} {piece['name']:<44} {took:>12}  {outcome}")
    return "\n".join([*lines, "", *_kernels(pieces), *_aims(pieces)])


def _heading(device: Found) -> list[str]:
    if "platform" not in device:
        return [f"device     {device.get('error', 'unknown')}"]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    return [
        f"device     {device['devices']} x {device['device']}; {device['driver'] or 'no NVIDIA driver'}",
        f"machine    {device['cpu']}, {device['cores']} cores; python {device['python']}, {versions}",
        f"commit     {device['commit'] or 'unknown'}",
    ]


def _outcome(found: Found, sides: list[dict[str, Any]]) -> str:
    if "settings" in found:
        return _speed(found, sides)
    if "bytes_per_second" in found:
        best = [f"{format_rate(max(map(max, found['bytes_per_second'].values())))}B/s"]
        products = found["operations_per_second"].items()
        return ", ".join([*best, *(f"{name} {format_rate(max(rates))}op/s" for name, rates in products)])
    if "top1" in found:
        same = found.get("same_weights") and found.get("same_metrics")
        return f"top-1 {found['top1']:.4f}, {'resumed bit for bit' if same else 'NOT resumed bit for bit'}"
    if "cores" in found:
        speeds = {kind: statistics.median(rounds) for kind, rounds in found["images_per_second"].items()}
        return ", ".join(f"{kind} {speed:.0f} images/s" for kind, speed in speeds.items())
    return "; ".join(f"{name} {_small(value)}" for name, value in found.items() if isinstance(value, dict))


def _small(found: Found) -> str:
    """Returns the outcome of a golden file, of a precision of products, or of a type of codes."""
    if "rows" in found:
        worst = max((row["ratio"] for row in found["rows"]), default=0.0)
        failed = ", ".join(f"{row['group']} {row['error']:.1e}" for row in found["rows"] if not row["passed"])
        if found["passed"]:
            return f"pass ({worst:.2g} of the tolerance)"
        return f"FAIL ({found['error'] or failed})"
    if "float32" in found:
        flips = (f"{dtype} {100 * shares['mean']:.2g} %" for dtype, shares in found.items())
        return "precision flips of signs " + ", ".join(flips)
    exact = all(shape.get("exact") for shape in found.values())
    rates = [shape["operations_per_second"] for shape in found.values() if "exact" in shape]
    failed = next((shape["error"] for shape in found.values() if "error" in shape), "")
    return failed or f"{format_rate(max(rates))}op/s, {'exact' if exact else 'NOT EXACT'}"


def _speed(side: Found, sides: list[dict[str, Any]]) -> str:
    speeds = {kind: statistics.median(rounds) for kind, rounds in side["images_per_second"].items()}
    parts = [f"{kind} {speed:.0f} images/s" for kind, speed in speeds.items()]
    if default := _default_of(side, sides):
        parts[-1] += f" ({speeds['training'] / _training(default):.2f} of the default)"
    parts.append(f"{_memory(side) / MIB:.0f} MiB an image")
    shares = side.get("achieved", {}).get("training", {})
    if "share_of_floor" in shares:
        parts.append(f"{100 * shares['share_of_floor']:.0f} % of the floor")
    if side["compile_seconds"]:
        parts.append(f"compiled in {sum(side['compile_seconds'].values()):.0f} s")
    return ", ".join(parts)


def _default_of(lever: Found, sides: list[dict[str, Any]]) -> Found | None:
    """Returns what the same model reaches at the same batch without a lever, if that was measured."""
    same = ("batch", "dtype", "settings", "version")
    others = [p["found"] for p in sides if p["part"] == "speed" and "PyTorch" not in p["name"]]
    return next((side for side in others if all(side.get(k) == lever.get(k) for k in same)), None)


def _memory(side: Found) -> float:
    return side["memory"]["peak"] / side["batch"]


def _sides(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for p in pieces if "settings" in p.get("found", {})]


def _kernels(pieces: list[dict[str, Any]]) -> list[str]:
    """Returns the profile of a training step, where one was taken."""
    for piece in pieces:
        if kernels := piece.get("found", {}).get("profile"):
            rows = [
                f"  {100 * k['share']:5.1f} % {k['milliseconds_of_a_step']:8.2f} ms"
                f" {k['calls_of_a_step']:6.0f} calls  {k['kernel']}"
                for k in kernels
            ]
            return [f"kernels of the training step, {piece['name']}", *rows, ""]
    return []


def _aims(pieces: list[dict[str, Any]]) -> list[str]:
    """Returns what was reached of each aim that both of its sides were measured for."""
    sides = [p for p in _sides(pieces) if _is_subject(p["found"]["settings"])]
    name, ours = _best([p for p in sides if "PyTorch" not in p["name"]])
    others = {how: _best([p for p in sides if f"PyTorch {how}, batch" in p["name"]])[1] for how in AIMS}
    if not ours:
        return []
    reached = {how: _training(ours) / _training(side) for how, side in others.items() if side}
    if others["eager"]:
        reached["memory"] = _memory(others["eager"]) / _memory(ours)
    if share := ours["achieved"].get("training", {}).get("share_of_floor"):
        reached["floor"] = share
    lines = [f"aims of training {SUBJECT[0]}, the fastest of ours: {name}"]
    for how, (text, aim) in AIMS.items():
        if how in reached:
            verdict = "reached" if reached[how] >= aim else "MISSED"
            lines.append(f"  {text:<50} {reached[how]:6.2f} of {aim:<5} {verdict}")
    return lines


def _is_subject(settings: Found) -> bool:
    return (settings["name"], settings["image_size"]) == SUBJECT


def _best(pieces: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Returns name and figures of the side that trains fastest, "" and none where none was measured."""
    trained = [(p["name"], p["found"]) for p in pieces if p["found"]["images_per_second"].get("training")]
    return max(trained, key=lambda side: _training(side[1]), default=("", {}))


def _training(side: Found) -> float:
    return statistics.median(side["images_per_second"]["training"])
