"""Measures forward pass, evaluation and training step, of bvit_jax and of the PyTorch code in the same run.

    python -m benchmarks.train_step --model binaryvit --batch 8 --reference ~/BinaryViT
    python -m benchmarks.train_step --model binaryvit --batch 8,32 --dtype float32,bfloat16 \\
        --reference ~/BinaryViT --compile --json found.json

Run it from the root of a checkout. Needs jax, flax, optax and numpy; with ``--reference``, a checkout of
github.com/Phuoc-Hoan-Le/BinaryViT, also torch; with ``--config``, what the file imports. Each side has a
process of its own and sleeps while the others are measured; the sides alternate, so that the noise of the
machine hits all alike. All train the student alone, by distillation from fixed logits, on random images
that are already on the device.

Kinds of steps:

- ``forward``: the model alone in evaluation mode, from normalised images to logits.
- ``evaluation``: the step of eval.py with its defaults, from uint8 images to sums of top-1, top-5 and loss;
  for BinaryViT (PyTorch), what its ``evaluate`` does with a batch.
- ``training``: the complete step: distillation loss, backward pass, AdamW.

Sides: bvit_jax in every ``--dtype``, and the reference, BinaryViT (PyTorch), which on a GPU runs as its own
script does, with float16 autocast and loss scaling, and on a CPU in float32. On a GPU the reference in
float32 is a further side; with ``--compile``, the reference through torch.compile.

Compile times: cold, of tracing and compiling; and of a first step after an earlier process has filled the
persistent compilation cache, from the start of lowering to the end of the step, in a new process.

The ceilings of the machine (`benchmarks.ceilings`) are measured before and after everything else; what a
step reaches is given as a share of them and of the least time that `benchmarks.floor` derives from them.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import measure
from benchmarks.table import table
from benchmarks.workload import KINDS, MODELS, Kind, Plan, known_model, parse_override
from bvit_jax.errors import UserError, nearest

DTYPES = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.json and not arguments.json.absolute().parent.is_dir():
            raise UserError(f"--json is {arguments.json}: its directory does not exist")
        report = measure(
            _plan(arguments),
            batches=integers("--batch", arguments.batch),
            dtypes=_dtypes(arguments.dtype),
            repeats=arguments.repeats,
            steps={
                "forward": arguments.forward_steps,
                "evaluation": arguments.evaluation_steps,
                "training": arguments.training_steps,
            },
            ceilings_scale=_ceilings_scale(arguments),
            arguments=sys.argv[1:] if argv is None else argv,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _plan(arguments: argparse.Namespace) -> Plan:
    """Returns the plan after the checks that need no other package.

    Raises:
      UserError: something asked for does not exist; names it.
    """
    if arguments.model:
        known_model(arguments.model)
    if arguments.reference:
        check_reference(arguments.reference)
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


def check_reference(checkout: Path) -> None:
    """Raises `UserError` unless a path is a checkout of the PyTorch code and torch is installed."""
    for part in ("models.py", "configs"):
        if not (checkout / part).exists():
            raise UserError(
                f"--reference is {checkout}: there is no {part}; expected a checkout of"
                " github.com/Phuoc-Hoan-Le/BinaryViT"
            )
    if importlib.util.find_spec("torch") is None:
        raise UserError("--reference needs torch, which is not installed: pip install torch")


def parts(texts: Sequence[str]) -> list[str]:
    """Returns what is between the commas of all texts, each once, in order."""
    return list(dict.fromkeys(part.strip() for text in texts for part in text.split(",")))


def integers(flag: str, texts: Sequence[str]) -> list[int]:
    """Returns the integers between the commas of an argument; raises `UserError` for one below 1."""
    for part in parts(texts):
        if not part.isdecimal() or int(part) < 1:
            raise UserError(f"{flag} has {part!r}; expected integers of at least 1, as in {flag} 1,2")
    return [int(part) for part in parts(texts)]


def _dtypes(texts: Sequence[str]) -> list[str | None]:
    if not texts:
        return [None]
    for part in parts(texts):
        if part not in DTYPES:
            raise UserError(f"--dtype has {part!r}" + nearest(part, DTYPES))
    return list(parts(texts))


def _kinds(texts: Sequence[str]) -> tuple[Kind, ...]:
    for part in parts(texts):
        if part not in KINDS:
            raise UserError(f"--kinds has {part!r}" + nearest(part, KINDS))
    return tuple(kind for kind in KINDS if not texts or kind in parts(texts))


def _ceilings_scale(arguments: argparse.Namespace) -> float:
    """Returns the scale of the ceilings, 0 for none."""
    if not 0 <= arguments.ceilings_scale <= 1:
        raise UserError(
            f"--ceilings-scale is {arguments.ceilings_scale:g}; expected a number from 0 (no ceilings) to 1"
        )
    return arguments.ceilings_scale


def positive(text: str) -> int:
    """Returns the integer of an argument, which must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, not {text}")
    return value


def _add_subject(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose the model."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="Measures forward pass, evaluation and training step, alone or against the PyTorch code.",
    )
    _add_subject(parser)
    parser.add_argument(
        "--batch",
        action="append",
        required=True,
        metavar="N[,N...]",
        help="batch sizes, measured one after the other",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="measure in the process that compiled, without a cache",
    )
    parser.add_argument("--plain", action="store_true", help="without what is the default on one CPU")
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
    parser.add_argument("--repeats", type=positive, default=5, metavar="K", help="rounds (5)")
    for kind, count in (("forward", 5), ("evaluation", 5), ("training", 3)):
        parser.add_argument(
            f"--{kind}-steps", type=positive, default=count, metavar="N", help=f"of a round ({count})"
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
