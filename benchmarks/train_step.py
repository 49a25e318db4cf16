"""Measures forward pass, evaluation and training step, and the PyTorch code's beside them in the same run.

    python benchmarks/train_step.py --model binaryvit --batch 8 --reference ~/BinaryViT
    python benchmarks/train_step.py --model binaryvit --batch 8,32 --dtype float32,bfloat16 \\
        --reference ~/BinaryViT --compile --json found.json

bvit_jax must be importable (installed, or PYTHONPATH=.). Needs jax, flax, optax and numpy; with
``--reference``, a checkout of github.com/Phuoc-Hoan-Le/BinaryViT, also torch; with ``--config``,
what the file imports. Each side lives in a process of its own and sleeps while the others are
measured; the sides alternate, so that the noise of the machine hits all. All train the student
alone, by distillation from fixed logits, on random images that are already on the device.

Kinds of steps:

- ``forward``: the model alone in evaluation mode, from normalised images to logits.
- ``evaluation``: the step of eval.py with what it does by default, from uint8 images to sums of top-1,
  top-5 and loss; of the reference, what its ``evaluate`` does with a batch.
- ``training``: the whole step: distillation loss, backward pass, AdamW.

Sides: bvit_jax in every ``--dtype``, and the reference, which runs as its own script does on a GPU, with
float16 autocast and loss scaling; on a CPU, in float32. On a GPU the reference in float32 is a further
side, with ``--compile`` the reference through torch.compile.

Compile times: cold, of tracing and compiling; and of a first step where an earlier process has filled the
persistent compilation cache, from the start of lowering to the end of the step, in a process of its own.

The ceilings of the machine (`ceilings.py`) are measured before and after everything else, and what a step
reaches is given as a share of them and of the least time that `floor.py` derives from them.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from floor import bandwidth, floor, flops, format_rate, least_bytes, peak
from workload import (
    KINDS,
    MODELS,
    Compilation,
    Facts,
    Kind,
    Memory,
    Plan,
    Side,
    Work,
    Worker,
    known_model,
    parse_override,
)

from bvit_jax.errors import UserError, nearest

Rounds = dict[Kind, list[float]]  # images/s of each round
OURS, REFERENCE = "bvit_jax", "reference"
REFERENCE_FLOAT32, REFERENCE_COMPILED = "reference float32", "reference compiled"
DTYPES = ("float32", "bfloat16")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
MIB = 2**20


def main() -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args()
    try:
        if arguments.json and not arguments.json.absolute().parent.is_dir():
            raise UserError(f"--json is {arguments.json}: its directory does not exist")
        report = measure(
            _plan(arguments),
            batches=_batches(arguments.batch),
            dtypes=_dtypes(arguments.dtype),
            repeats=arguments.repeats,
            steps={
                "forward": arguments.forward_steps,
                "evaluation": arguments.evaluation_steps,
                "training": arguments.training_steps,
            },
            ceilings_scale=_ceilings_scale(arguments),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(
    plan: Plan,
    *,
    batches: Sequence[int],
    dtypes: Sequence[str | None],
    repeats: int,
    steps: dict[Kind, int],
    ceilings_scale: float,
) -> dict[str, Any]:
    """Measures everything and returns it, ready for JSON.

    Args:
      plan: what is measured; its batch and dtype are replaced by each of the following.
      batches: images of a step.
      dtypes: compute dtypes of the JAX code, None for the config's; each is a side.
      repeats: rounds.
      steps: of a round, by kind.
      ceilings_scale: of `ceilings.default_sizes`; 0 measures no ceilings.

    Raises:
      UserError: a side cannot be built, or the two models differ.
    """
    load = os.getloadavg()[0]  # of other programs
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the GPU to all sides
    before = _ceilings(ceilings_scale)
    runs = []
    for batch in batches:
        with tempfile.TemporaryDirectory(prefix="train_step_") as cache:
            at_batch = dataclasses.replace(plan, batch=batch, cache=Path(cache))
            runs.append(_measure_batch(at_batch, dtypes, repeats, steps))
    ceilings = _merged(before, _ceilings(ceilings_scale)) if before else None
    for run in runs:
        _add_shares(run, ceilings)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            "cpu": cpu_model(),
            "cores": cores(),
            "load_average": load,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "versions": _versions(),
        "commit": _commit(),
        "model": plan.model or plan.config,
        "kinds": list(plan.kinds),
        "steps": {kind: steps[kind] for kind in plan.kinds},
        "ceilings": ceilings,
        "runs": runs,
    }


def _measure_batch(
    plan: Plan, dtypes: Sequence[str | None], repeats: int, steps: dict[Kind, int]
) -> dict[str, Any]:
    """Builds the sides of one batch size, measures them in turn and returns what was found."""
    plans = {_our_name(dtype): dataclasses.replace(plan, dtype=dtype) for dtype in dtypes}
    workers = {side: Worker(side, _start_jax, of_side) for side, of_side in plans.items()}
    workers |= _start_references(plan, next(iter(workers.values())).facts)
    facts = {side: worker.facts for side, worker in workers.items()}
    if len({side.parameters for side in facts.values()}) > 1:
        counts = " and ".join(f"{side.parameters:,}" for side in facts.values())
        raise UserError(f"the two models differ: {counts} parameters; check --set and the checkout")
    compilation, left_out = _prepare(workers)
    cached = {side: _cached_first_steps(side, of_side) for side, of_side in plans.items()}
    if not plan.cold:
        for side, of_side in plans.items():
            workers[side].finish()
            workers[side] = Worker(side, _start_jax, of_side)
            workers[side].prepare()  # out of the cache
    rounds: dict[str, Rounds] = {side: {kind: [] for kind in plan.kinds} for side in workers}
    for number in range(1, repeats + 1):
        for kind in plan.kinds:
            for side, worker in workers.items():
                seconds = worker.seconds(kind, steps[kind])
                rounds[side][kind].append(plan.batch * steps[kind] / seconds)
        _print_progress(plan.batch, number, repeats, rounds)
    memory = {side: worker.finish() for side, worker in workers.items()}
    works = [compilation[side].work for side in plans]
    return {
        "batch": plan.batch,
        "work": dataclasses.asdict(works[0]) if works[0] else None,  # the same in every dtype
        "sides": {
            side: {
                **dataclasses.asdict(facts[side]),
                **_without_work(compilation[side]),
                "cached_first_step_seconds": cached.get(side, {}),
                "images_per_second": rounds[side],
                "memory": dataclasses.asdict(memory[side]),
            }
            for side in workers
        },
        "left_out": left_out,
        "ratios": _ratios(rounds, memory),
    }


def _our_name(dtype: str | None) -> str:
    return f"{OURS} {dtype}" if dtype else OURS


def _is_ours(side: str) -> bool:
    return side.split()[0] == OURS


def _start_references(plan: Plan, ours: Facts) -> dict[str, Worker]:
    """Starts the sides of the PyTorch code that this machine has, with the settings of our model."""
    if not plan.reference:
        return {}

    def start(title: str, **changes: Any) -> Worker:
        return Worker(title, _start_torch, dataclasses.replace(plan, **changes), ours.settings)

    workers = {REFERENCE: start("the reference", compiled=False)}
    if workers[REFERENCE].facts.device != "cpu":
        workers[REFERENCE_FLOAT32] = start("the reference in float32", compiled=False, autocast=False)
    if plan.compiled:
        workers[REFERENCE_COMPILED] = start("the compiled reference")
    return workers


def _prepare(workers: dict[str, Worker]) -> tuple[dict[str, Compilation], dict[str, str]]:
    """Compiles all sides; takes the compiled reference out where that fails, and returns the reason."""
    compilation: dict[str, Compilation] = {}
    left_out: dict[str, str] = {}
    for side, worker in list(workers.items()):
        try:
            compilation[side] = worker.prepare()
        except UserError as error:
            if side != REFERENCE_COMPILED:
                raise
            left_out[side] = str(error)
            print(f"{side} is left out: {error}", file=sys.stderr, flush=True)
            worker.finish()
            del workers[side]
    return compilation, left_out


def _cached_first_steps(side: str, plan: Plan) -> dict[Kind, float]:
    """Returns the seconds of a first step with what the main process of a side has compiled and kept."""
    found: dict[Kind, float] = {}
    for kind in plan.kinds:
        worker = Worker(side, _start_jax, dataclasses.replace(plan, kinds=(kind,)))
        seconds = worker.first_step(kind)
        worker.finish()
        if seconds is None:
            print(f"{side}: nothing of the {kind} step was in the compilation cache", file=sys.stderr)
        else:
            found[kind] = seconds
    return found


def _without_work(compilation: Compilation) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(compilation).items() if name != "work"}


def _ratios(rounds: dict[str, Rounds], memory: dict[str, Memory]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns ours over the reference's, by our side, the other side and the figure.

    Of the speeds, the median of the rounds' ratios, and as ``best_…`` the ratio of the two best
    rounds: other programs on the machine slow the sides down unequally, and never speed them up.
    """
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for ours in filter(_is_ours, rounds):
        for theirs in (side for side in rounds if not _is_ours(side)):
            found = ratios.setdefault(ours, {}).setdefault(theirs, {})
            for kind, speeds in rounds[ours].items():
                others = rounds[theirs][kind]
                found[kind] = statistics.median(a / b for a, b in zip(speeds, others, strict=True))
                found[f"best_{kind}"] = max(speeds) / max(others)
            found["memory"] = memory[ours].peak / memory[theirs].peak
    return ratios


def _start_jax(plan: Plan, context: None) -> Side:
    import jax_side  # here, because only the process of this side may import jax

    return jax_side.start(plan, context)


def _start_torch(plan: Plan, context: dict[str, Any]) -> Side:
    import torch_side  # likewise

    return torch_side.start(plan, context)


def _print_progress(batch: int, number: int, repeats: int, rounds: dict[str, Rounds]) -> None:
    speeds = "; ".join(
        f"{side} " + ", ".join(f"{kind} {speeds[-1]:.2f}" for kind, speeds in of_side.items())
        for side, of_side in rounds.items()
    )
    print(f"batch {batch}, round {number}/{repeats}, images/s: {speeds}", file=sys.stderr, flush=True)


# Ceilings, and what is reached of them


def _ceilings(scale: float) -> dict[str, Any] | None:
    """Returns what `ceilings.measure` finds, in a process of its own that gives its memory back."""
    if not scale:
        return None
    print("measuring the ceilings of the machine", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_ceilings, scale).result()


def _measure_ceilings(scale: float) -> dict[str, Any]:
    import ceilings  # here, because only processes of its own may import jax
    import jax

    return ceilings.measure(ceilings.default_sizes(jax.default_backend(), scale))


def _merged(before: dict[str, Any], after: dict[str, Any] | None) -> dict[str, Any]:
    """Returns ceilings with the rounds of both measurements."""
    merged = dict(before)
    for name in ("bytes_per_second", "operations_per_second"):
        of_after = after[name] if after else {}
        merged[name] = {key: rates + of_after.get(key, []) for key, rates in before[name].items()}
    return merged


def _add_shares(run: dict[str, Any], ceilings: dict[str, Any] | None) -> None:
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


# The table


def table(report: dict[str, Any]) -> str:
    """Returns the findings of `measure` as plain text."""
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
    others = [side for side in sides if not _is_ours(side)]
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


def _versions() -> dict[str, str]:
    """Returns the versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Returns the commit of this checkout, marked where files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        ran = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() or None


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
        batch=0,  # of `measure`
        dtype=None,  # likewise
        reference=arguments.reference,
        compiled=arguments.compile,
        kinds=_kinds(arguments.kinds),
        plain=arguments.plain,
        cold=arguments.cold,
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


def _parts(texts: Sequence[str]) -> list[str]:
    """Returns what is between the commas of all texts, each once, in order."""
    return list(dict.fromkeys(part.strip() for text in texts for part in text.split(",")))


def _batches(texts: Sequence[str]) -> list[int]:
    for part in _parts(texts):
        if not part.isdecimal() or int(part) < 1:
            raise UserError(f"--batch has {part!r}; expected whole numbers of at least 1, as in --batch 8,32")
    return [int(part) for part in _parts(texts)]


def _dtypes(texts: Sequence[str]) -> list[str | None]:
    if not texts:
        return [None]
    for part in _parts(texts):
        if part not in DTYPES:
            raise UserError(f"--dtype has {part!r}" + nearest(part, DTYPES))
    return list(_parts(texts))


def _kinds(texts: Sequence[str]) -> tuple[Kind, ...]:
    for part in _parts(texts):
        if part not in KINDS:
            raise UserError(f"--kinds has {part!r}" + nearest(part, KINDS))
    return tuple(kind for kind in KINDS if not texts or kind in _parts(texts))


def _ceilings_scale(arguments: argparse.Namespace) -> float:
    """Returns the scale of the ceilings, 0 for none."""
    if not 0 <= arguments.ceilings_scale <= 1:
        raise UserError(
            f"--ceilings-scale is {arguments.ceilings_scale:g}; expected a number from 0 (no ceilings) to 1"
        )
    return arguments.ceilings_scale


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, not {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_step.py",
        description="Measures forward pass, evaluation and training step, alone or beside the PyTorch code.",
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
    parser.add_argument(
        "--batch",
        action="append",
        required=True,
        metavar="N[,N...]",
        help="images of a step; several are measured one after the other",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="measure in the process that compiled, in place of one that found the programs in the cache",
    )
    parser.add_argument(
        "--plain", action="store_true", help="without what the JAX code does on one CPU by default"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        metavar="NAME[,NAME]",
        help=f"compute dtypes of the JAX code, each a side: {', '.join(DTYPES)} (the config's, or float32)",
    )
    parser.add_argument(
        "--kinds",
        action="append",
        default=[],
        metavar="KIND[,KIND...]",
        help=f"steps to measure ({','.join(KINDS)})",
    )
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="the PyTorch code")
    parser.add_argument(
        "--compile", action="store_true", help="also the reference with torch.compile, as a side of its own"
    )
    parser.add_argument("--repeats", type=_positive, default=5, metavar="K", help="rounds (5)")
    for kind, count in (("forward", 5), ("evaluation", 5), ("training", 3)):
        parser.add_argument(
            f"--{kind}-steps", type=_positive, default=count, metavar="N", help=f"of a round ({count})"
        )
    parser.add_argument(
        "--ceilings-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="size of the arrays that the ceilings are measured with, a share of the usual; 0: no ceilings",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
