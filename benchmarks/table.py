"""What `train_step.py` found, as plain text."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.floor import format_rate
from benchmarks.workload import Kind, is_ours

MIB = 2**20


def table(report: dict[str, Any]) -> str:
    """Returns a report of `train_step.measure` as plain text."""
    parts = ["\n".join(_heading(report))]
    if report["ceilings"]:
        parts.append("\n".join(_ceiling_lines(report["ceilings"])))
    parts += [_batch_table(report, run) for run in report["runs"]]
    if len(report["runs"]) > 1:
        parts.append(_summary(report))
    return "\n\n".join(parts)


def _heading(report: dict[str, Any]) -> list[str]:
    machine, steps = report["machine"], report["steps"]
    sides = report["runs"][0]["sides"]
    ours = next(iter(sides.values()))
    versions = [f"{name} {version}" for name, version in report["versions"].items()]
    rounds = len(next(iter(ours["images_per_second"].values())))
    return [
        f"command    {report['command']}",
        f"machine    {machine['cpu']}, {machine['cores']} cores; device: {ours['device']};"
        f" load average before the start: {machine['load_average']:.1f}",
        f"versions   python {machine['python']}, " + ", ".join(versions),
        f"model      {report['model']}, {ours['parameters']:,} parameters",
        f"rounds     {rounds} of " + ", ".join(f"{count} {kind} steps" for kind, count in steps.items()),
        "           median (lowest to highest); ratio: median of the rounds' (of the best rounds)",
    ]


def _ceiling_lines(ceilings: dict[str, Any]) -> list[str]:
    memory = ", ".join(f"{name} {format_rate(max(r))}B/s" for name, r in ceilings["bytes_per_second"].items())
    products = ", ".join(
        f"{name} {format_rate(max(r))}op/s" for name, r in ceilings["operations_per_second"].items()
    )
    return [f"memory     {memory}", f"products   {products}"]


def _batch_table(report: dict[str, Any], run: dict[str, Any]) -> str:
    sides = run["sides"]
    size = next(iter(sides.values()))["settings"]["image_size"]
    lines = [f"batch {run['batch']}: images of {size}x{size}"]
    lines += [f"{side} is left out: {reason}" for side, reason in run["left_out"].items()]
    lines.append(_row("", list(sides)))
    lines.append(_row("dtype", [side["dtype"] for side in sides.values()]))
    if any(side["mode"] for side in sides.values()):
        lines.append(_row("mode", [side["mode"] or "-" for side in sides.values()]))
    others = [side for side in sides if not is_ours(side)]
    for kind in report["kinds"]:
        lines.append(
            _row(f"{kind}, images/s", [_speed(s["images_per_second"][kind]) for s in sides.values()])
        )
        for other in others:
            cells = [_ratio(run["ratios"].get(side, {}).get(other, {}), kind) for side in sides]
            lines.append(_row(f"  ratio to {other}", cells))
    memory = [side["memory"] for side in sides.values()]
    lines.append(_row(f"peak memory of {memory[0]['of']}, MiB", [_mib(m["peak"]) for m in memory]))
    for other in others:
        found = [run["ratios"].get(side, {}).get(other, {}).get("memory") for side in sides]
        lines.append(_row(f"  ratio to {other}", [_number(value) for value in found]))
    lines.append(_row("  before the first step, process", [_mib(m["setup_peak"]) for m in memory]))
    per_kind = (
        ("temporaries of {}, MiB", "temporary_bytes", _mib),
        ("compile time of {}, s", "compile_seconds", _tenths),
        ("cached first step of {}, s", "cached_first_step_seconds", _tenths),
    )
    for title, name, show in per_kind:
        for kind in report["kinds"]:
            lines.append(_row(title.format(kind), [show(side[name].get(kind)) for side in sides.values()]))
    for kind in report["kinds"]:
        lines += _achieved_rows(kind, list(sides.values()))
    return "\n".join(lines)


def _achieved_rows(kind: Kind, sides: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what the steps of a kind reach: FLOP/s, bytes/s, and their shares of ceilings and floor."""
    found = [side["achieved"].get(kind, {}) for side in sides]

    def cells(name: str, unit: str, share: str) -> list[str]:
        return [f"{format_rate(x[name])}{unit}{_share(x.get(share))}" if name in x else "-" for x in found]

    rows = [
        _row(f"{kind}, products (of ceiling)", cells("flops_per_second", "FLOP/s", "share_of_flops")),
        _row("  accessed (of bandwidth)", cells("accessed_bytes_per_second", "B/s", "share_of_bytes")),
    ]
    for title, name, unit in (("FLOPs", "compiler_flops", "FLOP"), ("bytes", "compiler_bytes", "B")):
        counted = [side[name].get(kind) for side in sides]
        rows.append(_row(f"  XLA's {title} of a step", [_amount(count, unit) for count in counted]))
    if any("share_of_floor" in x for x in found):
        floors = [
            f"{_ms(x['floor_seconds'])} of {_ms(x['seconds'])} ms{_share(x['share_of_floor'])}"
            if "share_of_floor" in x
            else "-"
            for x in found
        ]
        rows.append(_row("  floor (share reached)", floors))
    return rows


def _summary(report: dict[str, Any]) -> str:
    """Returns the medians of images/s by batch."""
    names = list(dict.fromkeys(side for run in report["runs"] for side in run["sides"]))
    lines = ["images/s, medians"]
    for kind in report["kinds"]:
        lines.append(_row(kind, names))
        for run in report["runs"]:
            speeds = [run["sides"].get(name, {}).get("images_per_second", {}).get(kind) for name in names]
            cells = [_number(statistics.median(rounds) if rounds else None) for rounds in speeds]
            lines.append(_row(f"  batch {run['batch']}", cells))
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<34}" + "".join(f" {cell:>29}" for cell in cells)


def _speed(rounds: list[float]) -> str:
    return f"{statistics.median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def _ratio(ratios: dict[str, float], kind: Kind) -> str:
    return f"{ratios[kind]:.2f} (best {ratios[f'best_{kind}']:.2f})" if kind in ratios else "-"


def _share(share: float | None) -> str:
    return "" if share is None else f" ({100 * share:.3g} %)"


def _amount(count: float | None, unit: str) -> str:
    return f"{format_rate(count)}{unit}" if count else "-"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"


def _tenths(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"
