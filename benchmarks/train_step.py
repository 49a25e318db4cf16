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
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from machine import commit, cores, cpu_model, versions
from shares import add_shares, merged
from table import table
from workload import (
    KINDS,
    MODELS,
    OURS,
    Compilation,
    Facts,
    Kind,
    Memory,
    Plan,
    Side,
    Worker,
    is_ours,
    known_model,
    parse_override,
)

from bvit_jax.errors import UserError, nearest

Rounds = dict[Kind, list[float]]  # images/s of each round
REFERENCE = "reference"
REFERENCE_FLOAT32, REFERENCE_COMPILED = "reference float32", "reference compiled"
DTYPES = ("float32", "bfloat16")


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
    ceilings = merged(before, _ceilings(ceilings_scale)) if before else None
    for run in runs:
        add_shares(run, ceilings)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            "cpu": cpu_model(),
            "cores": cores(),
            "load_average": load,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "versions": versions(),
        "commit": commit(),
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
    if not plan.cold:
        for side in plans:
            workers[side].finish()
    cached = {side: _cached_first_steps(side, of_side) for side, of_side in plans.items()}
    if not plan.cold:
        for side, of_side in plans.items():
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
    for ours in filter(is_ours, rounds):
        for theirs in (side for side in rounds if not is_ours(side)):
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
