"""Trains the PyTorch code and bvit_jax side by side on the same batches, and compares whole trainings.

    python -m benchmarks.against_pytorch --reference ~/BinaryViT --json found.json
    python -m benchmarks.against_pytorch --reference ~/BinaryViT --dataset icons --data_dir DATA --teacher DIR

Needs torch and timm, and a checkout of github.com/Phuoc-Hoan-Le/BinaryViT, whose model and loss are used as
they are but for what is written there as numbers for 224 pixels: the sides of its patch embeddings and the
size of its first patches. Optimiser and schedule are timm's, as in its ``main.py``. The models, a BinaryViT
and a ReActNet-DeiT of the size of ``configs/digits.py``, are distilled from a DeiT. Both sides start from the
PyTorch model's initial weights and receive the same images and the same logits of the teacher.

First, in float64, how many steps the losses stay together. Once they part, our model takes over the PyTorch
side's parameters: if its loss on the same batch is then equal again, the two programs compute the same
function, and what parted them is a sign that rounding decides.

Then, in float32 and with as many data orders as ``--runs``, the top-1 that each side has at the end, and
tests of whether they are the same: of means (Student's, paired by data order) and of distributions
(Mann-Whitney). Should they differ, two more figures say where: the mean loss of the last epoch, and the top-1
of the PyTorch side's weights in our evaluation.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # called as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from benchmarks.train_step import check_reference, parts
from benchmarks.training_sides import Ours, Teacher, Theirs, steps_per_epoch
from bvit_jax import data, models
from bvit_jax.data.cores import usable_cores
from bvit_jax.errors import UserError, nearest
from bvit_jax.report.machine import cpu_model, versions
from bvit_jax.runtime.arguments import positive
from configs import digits, icons

TOGETHER = 1e-9  # relative difference of losses
ENDS = ("ours", "theirs", "theirs_by_us", "our_loss", "their_loss")  # lists with a number per data order
MODELS: dict[str, dict[str, Any]] = {
    "binaryvit": {
        "width": (16, 32, 64, 128),
        "depth": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 8),
        "mlp_dim": (64, 128, 128, 256),
        "reduction": (4, 2, 1, 1),
    },
    "react_deit": {
        "width": 64,
        "depth": 4,
        "num_heads": 4,
        "mlp_dim": 256,
        "class_token": True,
        "pool_branches": (),
        "layer_scale": False,
    },
}


def experiment(name: str, arguments: argparse.Namespace) -> ConfigDict:
    """Returns the configuration of both sides for a model."""
    config = digits.get_config() if arguments.dataset == "digits" else icons.get_config()
    size, classes = config.model.image_size, config.model.num_classes
    sizes = {"image_size": size, "num_classes": classes, "patch_size": size // 8}  # 8×8 tokens at first
    config.model = models.model_config(name, **sizes, **MODELS[name])
    config.epochs = arguments.epochs
    config.optim.schedule = "cosine_by_epoch"
    config.optim.lr_scale_batch = config.batch_size
    if arguments.data_dir:
        config.data.data_dir = arguments.data_dir
    if arguments.teacher:
        config.teacher.path = arguments.teacher
    return config


def train_batches(config: ConfigDict, seed: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the first batches of a training whose order and augmentation follow from the seed."""
    batches = data.train_batches(config.data, config.model.image_size, config.batch_size, seed)
    for _ in range(steps):
        batch = next(batches)
        yield {name: batch[name] for name in ("image", "label")}


def eval_batches(config: ConfigDict) -> Iterator[dict[str, np.ndarray]]:
    """Yields the held-out images."""
    return iter(data.eval_batches(config.data, config.model.image_size, config.eval_batch_size))


def follow(config: ConfigDict, checkout: Path, seed: int, steps: int) -> dict[str, Any]:
    """Trains both sides in float64 until their losses part; returns where, and what parted them."""
    teacher = Teacher(config, jnp.float64)
    theirs = Theirs(config, checkout, seed, "float64")
    ours = Ours(config, teacher, jnp.float64)
    ours.start(theirs.state())
    per_epoch, largest = steps_per_epoch(config), 0.0
    found: dict[str, Any] = {"seed": seed, "steps": steps, "differences": []}
    for number, batch in enumerate(train_batches(config, seed, steps), 1):
        before = theirs.state()
        flips, distance = ours.different_signs(before)
        loss, expected = ours.step(batch), theirs.step(batch, teacher.logits(batch))
        difference = abs(loss - expected) / abs(expected)
        found["differences"].append(difference)
        if difference > TOGETHER:
            same = abs(ours.loss_with(before, batch) - expected) / abs(expected)
            return found | {
                "parted": number,
                "difference": difference,
                "largest_before": largest,
                "different_signs": flips,
                "parameter_distance": distance,
                "difference_with_their_parameters": same,
            }
        largest = max(largest, difference)
        if number % per_epoch == 0:
            theirs.end_epoch(number // per_epoch - 1)
    return found | {"parted": None, "largest_before": largest}


def compare_ends(config: ConfigDict, checkout: Path, orders: range) -> dict[str, Any]:
    """Trains both sides in float32 for each data order; returns what every run ends with, and the tests.

    Of each side the top-1 and the mean loss of the last epoch, and the top-1 that our evaluation finds with
    the weights of the PyTorch side.
    """
    teacher = Teacher(config, jnp.float32)
    per_epoch = steps_per_epoch(config)
    ours = Ours(config, teacher, jnp.float32)
    found: dict[str, Any] = {"orders": [seed + 1 for seed in orders], **{name: [] for name in ENDS}}
    for seed in orders:
        theirs = Theirs(config, checkout, seed, "float32")
        ours.start(theirs.state())
        losses = []
        for number, batch in enumerate(train_batches(config, seed, config.epochs * per_epoch), 1):
            losses.append((ours.step(batch), theirs.step(batch, teacher.logits(batch))))
            if number % per_epoch == 0:
                theirs.end_epoch(number // per_epoch - 1)
        our_loss, their_loss = np.mean(losses[-per_epoch:], axis=0)
        found["our_loss"].append(float(our_loss))
        found["their_loss"].append(float(their_loss))
        found["ours"].append(ours.correct(eval_batches(config)))
        found["theirs"].append(theirs.correct(eval_batches(config)))
        ours.start(theirs.state())
        found["theirs_by_us"].append(ours.correct(eval_batches(config)))
        _say(f"  order {seed + 1}: " + ", ".join(f"{name} {found[name][-1]:.4f}" for name in ENDS))
    if len(orders) > 1:
        found["paired_t"] = float(stats.ttest_rel(found["ours"], found["theirs"]).pvalue)
        found["mann_whitney"] = float(stats.mannwhitneyu(found["ours"], found["theirs"]).pvalue)
    return found


def report(found: dict[str, Any]) -> str:
    """Returns what was found in Markdown."""
    lines = ["| float64 | seed | together | loss there | weights of another sign | with their parameters |"]
    lines.append("|---" * 6 + "|")
    for name, results in found["models"].items():
        for run in results["together"]:
            if run["parted"] is None:
                steps = f"all {run['steps']} steps, to {run['largest_before']:.0e}"
                lines.append(f"| {name} | {run['seed']} | {steps} | | | |")
            else:
                steps = f"{run['parted'] - 1} steps, to {run['largest_before']:.0e}"
                cells = f"{run['difference']:.0e} | {run['different_signs']}"
                same = f"{run['difference_with_their_parameters']:.0e}"
                lines.append(f"| {name} | {run['seed']} | {steps} | {cells} | {same} |")
    columns = "ours, top-1 | theirs, top-1 | their weights, our evaluation | paired t | Mann-Whitney"
    lines += ["", f"| float32 | orders | {columns} |"]
    lines.append("|---" * 7 + "|")
    for name, results in found["models"].items():
        ends = results["ends"]
        sides = [_mean(ends[side]) for side in ("ours", "theirs", "theirs_by_us")]
        tests = [f"p = {ends[test]:.2f}" if test in ends else "" for test in ("paired_t", "mann_whitney")]
        lines.append("| " + " | ".join((name, str(len(ends["ours"])), *sides, *tests)) + " |")
        losses = [f"{statistics.mean(ends[side]):.3f}" for side in ("our_loss", "their_loss")]
        lines.append(f"| {name}, loss of the last epoch | | {losses[0]} | {losses[1]} | | | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    found: dict[str, Any] = {
        "machine": {"cpu": cpu_model(), "cores": usable_cores()},
        "versions": versions(),
        "models": {},
    }
    try:
        check_reference(arguments.reference)
        for name in parts([arguments.models]):
            if name not in MODELS:
                raise UserError(f"--models has {name!r}{nearest(name, MODELS)}")
            config = experiment(name, arguments)
            results: dict[str, Any] = {"together": []}
            found["models"][name] = results
            with jax.enable_x64(True):
                for seed in range(arguments.seeds):
                    results["together"].append(follow(config, arguments.reference, seed, arguments.steps))
                    _say(f"{name}, seed {seed}: parted at step {results['together'][-1]['parted']}")
            _say(f"{name}, {config.epochs} epochs")
            orders = range(arguments.first - 1, arguments.first - 1 + arguments.runs)
            results["ends"] = compare_ends(config, arguments.reference, orders)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(found))
    return 0


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread} %"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _natural(text: str) -> int:
    """Returns the integer of 0 or more that an argument of a command is."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or above")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_pytorch",
        description="Trains the PyTorch code and bvit_jax side by side, and compares them.",
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="CHECKOUT", help="the PyTorch code")
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAME[,NAME]")
    parser.add_argument("--dataset", choices=("digits", "icons"), default="digits")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="where icons were prepared")
    parser.add_argument("--teacher", default="", metavar="DIR", help="in place of the one for digits")
    parser.add_argument("--seeds", type=_natural, default=3, metavar="N", help="trainings in float64")
    for name, default, text in (
        ("steps", 200, "of each of them, at most"),
        ("runs", 10, "trainings in float32, with different orders of the data"),
        ("first", 1, "number of the first such order: the next runs, or other ones on another core"),
        ("epochs", 15, "of each training in float32"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
