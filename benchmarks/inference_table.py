"""What `inference` found, as Markdown: tables, and which aims are reached."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.floor import best_rate, format_rate
from benchmarks.inference_sides import COMPILED, DEIT, OURS, REFERENCE, REFERENCE_COMPILED, SIDES, XLA

TO = {
    REFERENCE: "eager",
    REFERENCE_COMPILED: "torch.compile",
    DEIT: "DeiT-S",
}  # what others are compared with
STAGES = {  # of a start, in the words of its table
    "interpreter": "interpreter",
    "numpy": "+ numpy",
    "framework": "+ jax or torch",
    "model": "+ model",
    "first image": "+ first image",
}
MB = 1e6
# Times the throughput of another side, seconds of one image, bytes, and seconds.
TIMES = {"AVX-512": {REFERENCE: 15.0}, "AVX2": {REFERENCE: 10.0}}
ALWAYS_TIMES = {REFERENCE_COMPILED: 5.0, DEIT: 3.0}
LATENCY = {"AVX-512": 25e-3, "AVX2": 60e-3}
MEMORY, FIRST_ANSWER = 400e6, 3.0


@dataclass(frozen=True)
class Aim:
    """A figure and what it should be.

    Attributes:
      name: of the figure, in words.
      found: what was measured.
      bound: what is aimed at.
      least: whether the bound is the least that is aimed at, or the most.
      unit: how both are written.
    """

    name: str
    found: float
    bound: float
    least: bool
    unit: Callable[[float], str]

    @property
    def reached(self) -> bool:
        """Whether the figure is what it should be."""
        return self.found >= self.bound if self.least else self.found <= self.bound

    def __str__(self) -> str:
        """Returns it as a line."""
        word = "at least" if self.least else "at most"
        verdict = "reached" if self.reached else "missed"
        return f"{verdict}: {self.name} {self.unit(self.found)}; aim: {word} {self.unit(self.bound)}"


def report_text(report: Mapping[str, Any]) -> str:
    """Returns a report of `inference.measure` as Markdown."""
    parts = ["\n".join(_heading(report))]
    parts += [_run_table(report, run) for run in report["runs"]]
    if report["starts"]:
        parts.append(_start_table(report["starts"]))
    if met := list(aims(report)):
        parts.append("\n".join([f"Aims on {vector_unit(report)}:", "", *(f"- {aim}" for aim in met)]))
    return "\n\n".join(parts)


def vector_unit(report: Mapping[str, Any]) -> str:
    """Returns the kind of vector unit for which aims are chosen."""
    return "AVX-512" if any("512" in unit for unit in report["vector_units"].values()) else "AVX2"


def aims(report: Mapping[str, Any]) -> Iterator[Aim]:
    """Yields the aims that the report has figures for, of the packed model.

    Throughput is that of the best round at the best batch of each side, for each number of threads.
    """
    unit = vector_unit(report)
    ours = COMPILED if any(COMPILED in run["sides"] for run in report["runs"]) else XLA
    for threads in dict.fromkeys(run["threads"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["threads"] == threads and ours in run["sides"]]
        where = f"with {_threads(threads)}"
        for other, bound in {**TIMES[unit], **ALWAYS_TIMES}.items():
            both = [run for run in runs if other in run["sides"]]
            if both:
                found = _throughput(both, ours) / _throughput(both, other)
                yield Aim(f"throughput {where}", found, bound, True, _times(other))
        for run in runs:
            if run["batch"] == 1:
                found = min(run["sides"][ours]["seconds"])
                yield Aim(f"one image {where}", found, LATENCY[unit], False, lambda x: f"{1e3 * x:.1f} ms")
    if ours in report["starts"]:
        warm = report["starts"][ours]["warm"]
        peak = max(stages[-1]["peak"] for stages in warm)
        yield Aim("peak of memory", peak, MEMORY, False, lambda x: f"{x / MB:.0f} MB")
        first = statistics.median(stages[-1]["seconds"] for stages in warm)
        yield Aim("first answer with a warm cache", first, FIRST_ANSWER, False, lambda x: f"{x:.2f} s")


def _throughput(runs: list[Mapping[str, Any]], side: str) -> float:
    return max(run["batch"] / min(run["sides"][side]["seconds"]) for run in runs)


def _times(other: str) -> Callable[[float], str]:
    return lambda x: f"{x:.2f} times {SIDES[other]}" if x != round(x) else f"{x:.0f} times"


def _heading(report: Mapping[str, Any]) -> list[str]:
    machine, model = report["machine"], report["model"]
    units = ", ".join(f"{name} {unit}" for name, unit in report["vector_units"].items())
    installed = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"`{report['command']}`, commit {report['commit']}",
        "",
        f"- {machine['cpu']}, {machine['cores']} cores, load average {machine['load_average']:.1f} before the"
        f" start; vector units: {units or 'not known'}"
        + (f"; capped to {report['isa']}" * bool(report["isa"])),
        f"- Python {machine['python']}, {installed}",
        f"- {model['settings']['name']}, {model['settings']['image_size']} pixels:"
        f" {model['bytes'] / MB:.2f} MB packed,"
        f" {2 * model['binary_macs'] / 1e9:.2f} G binary operations an image",
    ]
    for threads, rates in report["ceilings"].items():
        best = ", ".join(f"{name} {format_rate(best_rate(rounds))}op/s" for name, rounds in rates.items())
        lines.append(f"- ceiling of binary operations with {_threads(int(threads))}: {best}")
    return lines + [f"- {side} is left out: {reason}" for side, reason in report["left_out"].items()]


def _run_table(report: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    sides, batch = run["sides"], run["batch"]
    others = [other for other in TO if other in sides]
    heads = ["side", "how", "a batch, ms", "images/s", *(f"to {TO[other]}" for other in others)]
    rows = [[*heads, "compile, s", "share of the floor"]]
    for side, found in sides.items():
        seconds = found["seconds"]
        shares = f"{100 * found['share_of_floor']:.1f} %" if side in OURS else "-"
        compiling = found["compile_seconds"]
        rows.append(
            [
                SIDES[side],
                found["mode"],
                f"{1e3 * statistics.median(seconds):.2f} ({1e3 * min(seconds):.2f})",
                f"{batch / statistics.median(seconds):.2f} ({batch / min(seconds):.2f})",
                *(ratio(seconds, sides[other]["seconds"]) for other in others),
                "-" if compiling is None else f"{compiling:.1f}",
                shares,
            ]
        )
    floor = next(iter(sides.values()))["floor_seconds"]
    title = (
        f"Batch {batch}, {_threads(run['threads'])}: median (best) of"
        f" {len(next(iter(sides.values()))['seconds'])} rounds; times as fast as another side, by the best"
        f" rounds (median of the rounds' ratios); counted floor {1e3 * floor:.3g} ms"
    )
    return f"{title}\n\n{_markdown(rows)}"


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Returns how many times as fast we are, by the best rounds and by the median of the rounds' ratios."""
    rounds = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return f"{min(theirs) / min(ours):.2f} ({rounds:.2f})"


def _start_table(starts: Mapping[str, Any]) -> str:
    rows = [["side", "cold, s", "warm, s", *(f"{name}, MB" for name in STAGES.values()), "peak, MB"]]
    for side, found in starts.items():
        warm = sorted(found["warm"], key=lambda stages: stages[-1]["seconds"])
        seconds = [stages[-1]["seconds"] for stages in warm]
        middle = warm[len(warm) // 2]
        resident = {stage["stage"]: stage["resident"] for stage in middle}
        rows.append(
            [
                SIDES[side],
                f"{found['cold'][-1]['seconds']:.2f}",
                f"{statistics.median(seconds):.2f} ({seconds[0]:.2f})",
                *(f"{resident[name] / MB:.0f}" for name in STAGES),
                f"{middle[-1]['peak'] / MB:.0f}",
            ]
        )
    title = (
        "From the start of a process to the answer for one image, with an empty cache of compiled programs"
        " and with a filled one (median, best), and resident memory of the latter at each stage"
    )
    return f"{title}\n\n{_markdown(rows)}"


def _markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)
