"""Measures forward pass and training step, and the PyTorch code's beside them in the same run.

    python benchmarks/train_step.py --model binaryvit --batch 8 --reference ~/BinaryViT

bvit_jax must be importable (installed, or PYTHONPATH=.). Needs jax, flax, optax and numpy; with
``--reference``, a checkout of github.com/Phuoc-Hoan-Le/BinaryViT, also torch; with ``--config``,
what the file imports. Each side lives in a process of its own and sleeps while the other is
measured; the sides alternate, so that the noise of the machine hits both. Both train the student
alone, by distillation from fixed logits, on random images that are already on the device. The
reference runs as its own script does on a GPU, with float16 autocast and loss scaling; on a CPU,
in float32.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from workload import KINDS, MODELS, Kind, Memory, Plan, Side, Worker, known_model, parse_override

from bvit_jax.errors import UserError

Rounds = dict[Kind, list[float]]  # images/s of each round
OURS, REFERENCE = "bvit_jax", "reference"
MIB = 2**20


def main() -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args()
    steps: dict[Kind, int] = {
        "forward": arguments.forward_steps,
        "training": arguments.training_steps,
    }
    try:
        if arguments.json and not arguments.json.absolute().parent.is_dir():
            raise UserError(f"--json is {arguments.json}: its directory does not exist")
        report = measure(_plan(arguments), arguments.repeats, steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(plan: Plan, repeats: int, steps: dict[Kind, int]) -> dict[str, Any]:
    """Builds the sides, measures them in turn and returns everything found, ready for JSON.

    Raises:
      UserError: a side cannot be built, or the two models differ.
    """
    load = os.getloadavg()[0]  # of other programs
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the GPU to both
    workers = {OURS: Worker(OURS, _start_jax, plan)}
    if plan.reference:
        settings = workers[OURS].facts.settings
        workers[REFERENCE] = Worker("the reference", _start_torch, plan, settings)
    facts = {side: worker.facts for side, worker in workers.items()}
    if len({side.parameters for side in facts.values()}) > 1:
        counts = " and ".join(f"{side.parameters:,}" for side in facts.values())
        raise UserError(f"the two models differ: {counts} parameters; check --set and the checkout")
    compilation = {side: worker.prepare() for side, worker in workers.items()}
    rounds: dict[str, Rounds] = {side: {kind: [] for kind in KINDS} for side in workers}
    for number in range(1, repeats + 1):
        for kind in KINDS:
            for side, worker in workers.items():
                seconds = worker.seconds(kind, steps[kind])
                rounds[side][kind].append(plan.batch * steps[kind] / seconds)
        _print_progress(number, repeats, rounds)
    memory = {side: worker.finish() for side, worker in workers.items()}
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": cores(),
            "load_average": load,
            "python": platform.python_version(),
        },
        "model": plan.model or plan.config,
        "batch": plan.batch,
        "steps": steps,
        "sides": {
            side: {
                **dataclasses.asdict(facts[side]),
                **dataclasses.asdict(compilation[side]),
                "images_per_second": rounds[side],
                "memory": dataclasses.asdict(memory[side]),
            }
            for side in workers
        },
        "ratios": _ratios(rounds, memory) if plan.reference else {},
    }


def _ratios(rounds: dict[str, Rounds], memory: dict[str, Memory]) -> dict[str, float]:
    """Returns ours over the reference's.

    Of the speeds, the median of the rounds' ratios, and as ``best_…`` the ratio of the two best
    rounds: other programs on the machine slow the sides down unequally, and never speed them up.
    """
    ratios: dict[str, float] = {}
    for kind in KINDS:
        ours, theirs = rounds[OURS][kind], rounds[REFERENCE][kind]
        ratios[kind] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        ratios[f"best_{kind}"] = max(ours) / max(theirs)
    ratios["memory"] = memory[OURS].peak / memory[REFERENCE].peak
    return ratios


def _start_jax(plan: Plan, context: None) -> Side:
    import jax_side  # here, because only the process of this side may import jax

    return jax_side.start(plan, context)


def _start_torch(plan: Plan, context: dict[str, Any]) -> Side:
    import torch_side  # likewise

    return torch_side.start(plan, context)


def _print_progress(number: int, repeats: int, rounds: dict[str, Rounds]) -> None:
    speeds = "; ".join(
        f"{side} " + ", ".join(f"{kind} {rounds[side][kind][-1]:.2f}" for kind in KINDS) for side in rounds
    )
    print(f"round {number}/{repeats}, images/s: {speeds}", file=sys.stderr, flush=True)


# The table


def table(report: dict[str, Any]) -> str:
    """Returns the findings of `measure` as plain text."""
    sides, ratios = report["sides"], report["ratios"]
    lines = [*_heading(report), ""]
    lines.append(_row("", [*sides, *(["ratio"] if ratios else [])]))
    for kind in KINDS:
        cells = [_speed(side["images_per_second"][kind]) for side in sides.values()]
        if ratios:
            cells.append(f"{ratios[kind]:.2f} (best {ratios[f'best_{kind}']:.2f})")
        lines.append(_row(f"{kind}, images/s", cells))
    memory = [side["memory"] for side in sides.values()]
    peaks = [_mib(side["peak"]) for side in memory]
    if ratios:
        peaks.append(f"{ratios['memory']:.2f}")
    lines.append(_row(f"peak memory of {memory[0]['of']}, MiB", peaks))
    lines.append(_row("  before the first step, process", [_mib(m["setup_peak"]) for m in memory]))
    for kind in KINDS:
        temporaries = [_mib(side["temporary_bytes"].get(kind)) for side in sides.values()]
        lines.append(_row(f"temporaries of {kind}, MiB", temporaries))
    for kind in KINDS:
        seconds = [_seconds(side["compile_seconds"].get(kind)) for side in sides.values()]
        lines.append(_row(f"compile time of {kind}, s", seconds))
    return "\n".join(lines)


def _heading(report: dict[str, Any]) -> list[str]:
    machine, ours = report["machine"], report["sides"][OURS]
    size, steps = ours["settings"]["image_size"], report["steps"]
    libraries = {OURS: "jax", REFERENCE: "torch"}
    versions = [f"{libraries[name]} {side['version']}" for name, side in report["sides"].items()]
    return [
        f"machine    {machine['cpu']}, {machine['cores']} cores; device: {ours['device']};"
        f" load average before the start: {machine['load_average']:.1f}",
        f"versions   python {machine['python']}, " + ", ".join(versions),
        f"model      {report['model']}, {ours['parameters']:,} parameters",
        f"batch      {report['batch']} images of {size}x{size}",
        *(f"{name:<10} {side['precision']}" for name, side in report["sides"].items()),
        f"rounds     {len(ours['images_per_second'][KINDS[0]])} of"
        f" {steps['forward']} forward and {steps['training']} training steps;"
        " median (lowest to highest); ratio: median of the rounds' (of the best rounds)",
    ]


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<32}" + "".join(f"{cell:>30}" for cell in cells)


def _speed(rounds: list[float]) -> str:
    return f"{statistics.median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


# The machine and the command line


def cpu_model() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan(arguments: argparse.Namespace) -> Plan:
    """Returns the plan after the checks that need no other package.

    Raises:
      UserError: something asked for does not exist; names it.
    """
    if arguments.model:
        known_model(arguments.model)
    if arguments.reference:
        _check_reference(arguments.reference)
    elif arguments.compile:
        raise UserError("--compile is for the reference; add --reference CHECKOUT")
    return Plan(
        model=arguments.model,
        config=arguments.config,
        overrides=dict(map(parse_override, arguments.set)),
        batch=arguments.batch,
        dtype=arguments.dtype,
        reference=arguments.reference,
        compiled=arguments.compile,
    )


def _check_reference(checkout: Path) -> None:
    for part in ("models.py", "configs"):
        if not (checkout / part).exists():
            raise UserError(
                f"--reference is {checkout}: there is no {part}; expected a checkout of"
                " github.com/Phuoc-Hoan-Le/BinaryViT"
            )
    if importlib.util.find_spec("torch") is None:
        raise UserError("--reference needs torch, which is not installed: pip install torch")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, not {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_step.py",
        description="Measures forward pass and training step, alone or beside the PyTorch code.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help=", ".join(MODELS))
    which.add_argument("--config", metavar="FILE[:ARG]", help="the model of an experiment in configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the model, such as image_size=32 or 'width=(8,16)'; repeatable",
    )
    parser.add_argument("--batch", type=_positive, required=True, metavar="N", help="images of a step")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="compute dtype of the JAX code (default: the config's, or float32)",
    )
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="the PyTorch code")
    parser.add_argument("--compile", action="store_true", help="torch.compile the reference")
    parser.add_argument("--repeats", type=_positive, default=5, metavar="K", help="rounds (5)")
    parser.add_argument("--forward-steps", type=_positive, default=5, metavar="N", help="of a round (5)")
    parser.add_argument("--training-steps", type=_positive, default=3, metavar="N", help="of a round (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
