"""Trains the four rows of Bi-ViT's ablation and prints their top-1: with and without scale and ranking.

    python -m benchmarks.bivit_ablation --dir runs/ablation --seeds 0 1 2 --epochs 15

Run it from the root of a checkout. Each run is that of configs/bivit_digits.py with another seed, and
continues after an interruption; figures are those of the last step. The table has the mean over the seeds
and the standard deviation of single runs.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvit_jax.runtime.interruption import Interruption
from bvit_jax.training.loop import train_and_evaluate
from configs import bivit_digits

# Of each row: whether attention has the learned scale, and whether the loss has the ranking term.
ROWS = {
    "baseline": (False, False),
    "+ scale": (True, False),
    "+ ranking": (False, True),
    "both": (True, True),
}
KEPT = ("top1", "loss")


def run_row(row: str, seed: int, directory: Path, epochs: int, weight: float) -> dict[str, float]:
    """Trains one row with one seed and returns the figures of its last evaluation."""
    config = bivit_digits.get_config()
    config.model.learned_scale, ranks = ROWS[row]
    config.loss.ranking_weight = weight if ranks else 0.0
    config.seed = seed
    config.epochs = epochs
    config.eval_every_epochs = epochs
    config.health = False
    config.checkpoint.every_steps = 10**9  # at the end only
    workdir = directory / f"{row.replace(' ', '')}_{seed}"
    figures = train_and_evaluate(config, workdir, interruption=Interruption(sigterm=True))
    return {name: figures[name] for name in KEPT}


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Returns mean and deviation of the figures of several seeds."""
    columns = {name: [run[name] for run in runs] for name in KEPT}
    return {
        name: {
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "runs": values,
        }
        for name, values in columns.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all rows, one seed after the other, and prints a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/bivit_ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--ranking_weight", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="a file for the figures of every run")
    options = parser.parse_args(argv)
    options.dir.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in options.rows}
    for seed in options.seeds:
        for row, done in runs.items():
            done.append(run_row(row, seed, options.dir, options.epochs, options.ranking_weight))
    results = {row: summary(done) for row, done in runs.items()}
    for row, figures in results.items():
        top1, loss = figures["top1"], figures["loss"]
        spread = f" ± {100 * top1['deviation']:.2f}" if top1["deviation"] is not None else ""
        print(f"{row:12} top-1 {100 * top1['mean']:.2f}{spread} %   loss {loss['mean']:.4f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
