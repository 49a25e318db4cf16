"""Compiles a training step for several TPU topologies at the same batch per chip, and compares them.

    python -m benchmarks.topologies --config configs/binaryvit_small.py --topology v5e:4x2 \\
      --topology v5e:8x8 --topology v5e:16x16 --images_per_chip 32

Needs libtpu (``pip install "jax[tpu]"``), and no TPU. Prints a table, and below it whether a chip's
memory and least time are the same on any number of chips, the gradient is reduced once, and the number
of collectives of the batch norms is the same; where one of these does not hold, the exit status is 1.
"""

import argparse
import json
import logging
import multiprocessing
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from benchmarks.jax_side import load_config
from benchmarks.workload import parse_override
from bvit_jax import config as config_lib
from bvit_jax.errors import UserError
from bvit_jax.plan import topology
from bvit_jax.plan.dry_run import dry_run
from bvit_jax.runtime import process
from bvit_jax.runtime.arguments import positive

TOLERANCE = 0.05  # of memory and time
Figures = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    process.stay_on_cpu()
    try:
        found = measure(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    results = checks(list(found.values()))
    print(f"{_heading(arguments, found)}\n\n{table(found)}\n")
    for text, holds in results.items():
        print(f"- {text}: {'yes' if holds else 'NO'}")
    return 0 if all(results.values()) else 1


def measure(arguments: argparse.Namespace) -> dict[str, Figures]:
    """Returns the figures of `dry_run` of every topology.

    Raises:
      UserError: a topology or setting is wrong, or the batch does not fit.
    """
    for name in arguments.topology:  # all of them, before minutes of compiling the first
        topology.open_topology(name)
    spawn = multiprocessing.get_context("spawn")
    # A process compiles one topology, so that the next one starts with all of the memory.
    with ProcessPoolExecutor(arguments.jobs, spawn, max_tasks_per_child=1) as pool:
        results = pool.map(_measure_one, [arguments] * len(arguments.topology), arguments.topology)
        try:
            return dict(zip(arguments.topology, results, strict=True))
        except BrokenProcessPool:
            raise UserError(
                f"a compiling process was killed, perhaps out of memory; --jobs is {arguments.jobs}:"
                " try fewer"
            ) from None


def _measure_one(arguments: argparse.Namespace, name: str) -> Figures:
    process.take()
    process.stay_on_cpu()
    _start_logging()
    config = load_config(arguments.config)
    for text in arguments.set:
        config.update_from_flattened_dict(dict([parse_override(text)]))
    chips = len(topology.open_topology(name).devices)
    config.batch_size = config.eval_batch_size = chips * arguments.images_per_chip
    if arguments.compute_dtype:
        config.compute_dtype = arguments.compute_dtype
    config_lib.validate(config)
    figures = dry_run(config, name)
    print(f"{name}: compiled in {figures['compile_seconds']} s", file=sys.stderr, flush=True)
    return figures


def _start_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("bvit_jax").setLevel(logging.INFO)


def checks(found: Sequence[Figures]) -> dict[str, bool]:
    """Returns what must hold on any number of chips, in words, and whether it does."""

    def alike(name: str) -> bool:
        values = [figures[name] for figures in found]
        return max(values) <= (1 + TOLERANCE) * min(values)

    purposes = [figures["collectives_for"] for figures in found]
    reduced = [p["gradient"]["bytes"] + p["batch_norm_backward"]["bytes"] for p in purposes]
    counts = {tuple(p[f"batch_norm_{way}"]["count"] for way in ("forward", "backward")) for p in purposes}
    return {
        "a chip's memory is the same within 5 %": alike("total_mb"),
        "the least time of a step is the same within 5 %": alike("bound_ms"),
        # At most, because the compiler finds parameters with the same gradient, such as the shifts of
        # two branches that are added up, and reduces that once.
        "no gradient is reduced twice": all(
            (1 - TOLERANCE) * figures["parameters_bytes"] <= size <= figures["parameters_bytes"]
            for size, figures in zip(reduced, found, strict=True)
        ),
        "the number of collectives of batch norms is the same": len(counts) == 1,
    }


ROWS: dict[str, Callable[[Figures], str]] = {
    "chips": lambda f: f"{f['devices']}",
    "images per step": lambda f: f"{f['devices'] * f['images_per_device']}",
    "memory of a chip: arguments, MB": lambda f: f"{f['arguments_mb']:.0f}",
    "temporaries, MB": lambda f: f"{f['temporaries_mb']:.0f}",
    "program, MB": lambda f: f"{f['program_mb']:.0f}",
    "total, MB": lambda f: f"{f['total_mb']:.0f} of {f['chip_mb']:.0f}",
    "GFLOP per image": lambda f: f"{f['gflops_per_image']:.2f}",
    "GB accessed per image": lambda f: f"{f['gb_accessed_per_image']:.3f}",
    "of these in HBM": lambda f: f"{f['gb_of_memory_per_image']:.3f}",
    "least time of a step by FLOPs, ms": lambda f: f"{f['flops_ms']:.1f}",
    "by bytes, ms": lambda f: f"{f['bytes_ms']:.1f}",
    "at most images/s, all chips": lambda f: f"{f['images_per_second_bound']:.0f}",
    "all-reduces of gradients": lambda f: _traffic(f, "gradient"),
    "of batch norms, forward": lambda f: _traffic(f, "batch_norm_forward"),
    "of batch norms, backward": lambda f: _traffic(f, "batch_norm_backward"),
    "other": lambda f: _traffic(f, "other"),
    "kinds of collectives": lambda f: ", ".join(f["collectives"]),
    "compile time, s": lambda f: f"{f['compile_seconds']:.0f}",
}


def table(found: Mapping[str, Figures]) -> str:
    """Returns the figures of several topologies as a table in Markdown."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for name, show in ROWS.items():
        lines.append(f"| {name} | " + " | ".join(show(figures) for figures in found.values()) + " |")
    return "\n".join(lines)


def _traffic(figures: Figures, purpose: str) -> str:
    traffic = figures["collectives_for"][purpose]
    return f"{traffic['count']}, {traffic['bytes'] / 1e6:.3f} MB"


def _heading(arguments: argparse.Namespace, found: Mapping[str, Figures]) -> str:
    figures = next(iter(found.values()))
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    return (
        f"{arguments.config}: {figures['model']}, {figures['parameters'] / 1e6:.2f} M parameters,"
        f" {figures['compute_dtype']}, {arguments.images_per_chip} images a chip;"
        f" Python {platform.python_version()}, {versions}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]", help="an experiment")
    parser.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="CHIP:SHAPE",
        help="such as v5e:8x8; may be repeated",
    )
    parser.add_argument("--images_per_chip", type=positive, default=32)
    parser.add_argument("--compute_dtype", choices=config_lib.SETTINGS["compute_dtype"].values.choices)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the experiment; may be repeated",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="topologies to compile at the same time; BinaryViT takes 9 GB of memory for each (default: 1)",
    )
    parser.add_argument("--json", type=Path, help="file that receives everything found")
    return parser


if __name__ == "__main__":
    process.take()
    sys.exit(main())
