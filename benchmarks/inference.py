"""Measures inference on a CPU: packed models of bvit_jax, the PyTorch code, and a real-valued DeiT-S.

    python benchmarks/inference.py --reference ~/BinaryViT --json found.json
    python benchmarks/inference.py --sides compiled,xla --batch 1 --threads 1
    python benchmarks/inference.py --quick

The network is BinaryViT-small at 224 pixels with 1000 classes and random weights. Needs Linux, and of the
sides that are asked for jax and flax, bvit_kernels, torch, transformers, and with ``--reference`` a checkout
of github.com/Phuoc-Hoan-Le/BinaryViT; a side that cannot run is left out, with the reason. Sides:

- ``compiled``, ``xla``: the packed model with compiled operations, and with XLA's; ``float``: the same
  network in float32 by JAX, as it is without options. All three with their weights in the program.
- ``reference``, ``reference-compiled``: the PyTorch code, eager and through torch.compile.
- ``deit``, ``deit-int8``: transformers' DeiT in the size of DeiT-S, in float32 and with dynamically
  quantised linear layers.

For each number of threads, which are also the cores that a process may use, and each batch size, every side
has a process of its own and sleeps while the others are measured; they alternate, so that the noise of the
machine hits all alike. The steps go from normalised images in memory to logits. A round takes about
``--seconds`` of each side.

Then each side starts in a new process and classifies one image, first with an empty compilation cache and
then with what that left: seconds since the start of the process, and resident memory at each stage. A model
of bvit_jax is loaded from its files and takes a uint8 image; a PyTorch model is built with random weights.

The ceiling of binary operations is the best of XLA's and the compiled product of packed signs, measured on as
many cores; the counted floor of a batch is its binary operations at this rate, and nothing else.
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # called as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import inference_sides
from benchmarks.inference_measure import Amount, measure
from benchmarks.inference_sides import (
    COMPILED,
    DEIT,
    DEIT_INT8,
    FLOAT,
    REFERENCE,
    REFERENCE_COMPILED,
    SIDES,
    XLA,
)
from benchmarks.inference_table import report_text
from benchmarks.train_step import check_reference, integers, parts, positive
from bvit_jax.data.cores import usable_cores
from bvit_jax.errors import UserError, nearest

DEIT_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 224,
    "num_labels": 1000,
}
TINY_DEIT = {**DEIT_SMALL, "hidden_size": 32, "num_hidden_layers": 1, "num_labels": 10}
TINY: dict[str, Any] = {  # the PyTorch code has four stages of sides that are written as numbers
    "num_classes": 10,
    "width": (32,) * 4,
    "depth": (1,) * 4,
    "num_heads": (1,) * 4,
    "mlp_dim": (64,) * 4,
}
NEEDS = {  # packages, apart from jax
    COMPILED: ("bvit_kernels",),
    XLA: (),
    FLOAT: (),
    REFERENCE: ("torch",),
    REFERENCE_COMPILED: ("torch",),
    DEIT: ("torch", "transformers"),
    DEIT_INT8: ("torch", "transformers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    command = ["python", "-m", "benchmarks.inference", *(sys.argv[1:] if argv is None else argv)]
    try:
        if arguments.json and not arguments.json.absolute().parent.is_dir():
            raise UserError(f"--json is {arguments.json}: its directory does not exist")
        for report in measure(
            *_sides(arguments.sides, arguments.reference, arguments.quick),
            batches=integers("--batch", [arguments.batch or ("1" if arguments.quick else "1,8,64")]),
            threads=_threads(arguments.threads or ("1" if arguments.quick else "1,2")),
            amount=_amount(arguments),
            reference=arguments.reference,
            isa=arguments.isa,
            at_once=arguments.at_once,
        ):
            report["command"] = shlex.join(command)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report_text(report))
    return 0


def _sides(texts: Sequence[str], reference: Path | None, quick: bool) -> tuple[list[str], dict[str, str]]:
    """Returns the sides to measure, and why the others of those that were asked for are left out."""
    if reference:
        check_reference(reference)
    asked = parts(texts) or list(SIDES)
    for side in asked:
        if side not in SIDES:
            raise UserError(f"--sides has {side!r}" + nearest(side, SIDES))
    left_out: dict[str, str] = {}
    for side in asked:
        missing = [name for name in NEEDS[side] if importlib.util.find_spec(name) is None]
        if side in (REFERENCE, REFERENCE_COMPILED) and not reference:
            left_out[side] = "there is no --reference"
        elif missing:
            left_out[side] = f"{missing[0]} is not installed"
        elif quick and side == REFERENCE_COMPILED and side not in parts(texts):
            left_out[side] = "it compiles for long; ask for it with --sides"
    return [side for side in asked if side not in left_out], left_out


def _threads(text: str) -> list[int]:
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("this benchmark confines processes to cores, as Linux alone does")
    found = integers("--threads", [text])
    if max(found) > usable_cores():
        raise UserError(f"--threads is {text}; expected at most {usable_cores()}, the cores of this process")
    return found


def _amount(arguments: argparse.Namespace) -> Amount:
    if arguments.quick:
        return Amount(TINY, TINY_DEIT, rounds=2, seconds=0.01, starts=1, ceilings=0.001)
    return Amount({}, DEIT_SMALL, arguments.rounds, arguments.seconds, arguments.starts, ceilings=1.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description="Measures inference of packed models against float ones, alone or with the PyTorch code.",
    )
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="the PyTorch code")
    sides = f"what to measure ({','.join(SIDES)})"
    parser.add_argument("--sides", action="append", default=[], metavar="NAME[,NAME]", help=sides)
    parser.add_argument("--batch", metavar="N[,N...]", help="batch sizes (1,8,64)")
    parser.add_argument("--threads", metavar="N[,N...]", help="threads and cores of each side (1,2)")
    usual = ", ".join(f"{side}: {n}" for side, n in inference_sides.AT_ONCE.items())
    at_once = f"images that go through a JAX model together ({usual})"
    parser.add_argument("--at-once", type=positive, default=0, metavar="N", help=at_once)
    isa = "caps the vector unit of every side"
    parser.add_argument("--isa", choices=tuple(inference_sides.ISA), help=isa)
    for name, kind, default, text in (
        ("rounds", positive, 7, "of each side"),
        ("seconds", float, 1.0, "of a round, about"),
        ("starts", positive, 5, "with a warm cache"),
    ):
        help_text = f"{text} ({default:g})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=help_text)
    parser.add_argument("--quick", action="store_true", help="a tiny network, to see that everything runs")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the findings here, as they come"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
