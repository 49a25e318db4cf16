"""Trains the runs of a study, one after the other, and keeps what each has found."""

import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

from bvit_jax import files
from bvit_jax.ablation.study import Study
from bvit_jax.data.cores import usable_cores
from bvit_jax.errors import UserError
from bvit_jax.files import appearing
from bvit_jax.report import machine
from bvit_jax.runtime.interruption import Interruption
from bvit_jax.training.loop import train_and_evaluate
from bvit_jax.training.setup import Run, build, check, open_splits
from bvit_jax.workdir import starts
from bvit_jax.workdir.logged import Lines, read_metrics

RESULTS = "results.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run has found.

    Attributes:
      row: in the study.
      seed: of the run.
      top1: of the last evaluation, a share.
      loss: likewise, in nats.
      minutes: of training, without compilation and evaluation.
      device: what trained it last.
    """

    row: str
    seed: int
    top1: float
    loss: float
    minutes: float
    device: str


def run_study(study: Study, directory: Path, interruption: Callable[[], Interruption]) -> list[Result]:
    """Trains every run of a study that is not finished in ``directory``; returns what all have found.

    All rows have their first seed before any has its second. A run that was interrupted continues.

    Args:
      study: which runs there are.
      directory: receives a workdir for each, and ``results.json`` after each.
      interruption: makes what says when a run is to stop.

    Raises:
      UserError: a configuration is wrong, or differs from that of a finished run.
      Interrupted: an interruption said so; the same call continues.
    """
    for row, config in study.rows.items():
        check(config)
        for seed in study.seeds:
            starts.check(workdir_of(directory, row, seed), _with_seed(config, seed), allow_changes=False)
    results = read_results(directory)
    built: dict[str, Run] = {}
    wanted = [(row, seed) for seed in study.seeds for row in study.rows]
    for number, (row, seed) in enumerate(wanted, 1):
        if any((result.row, result.seed) == (row, seed) for result in results):
            continue
        logger.info("run %d of %d: %s, seed %d", number, len(wanted), row, seed)
        config, workdir = _with_seed(study.rows[row], seed), workdir_of(directory, row, seed)
        if row not in built:
            built[row] = build(config, open_splits(config).num_examples)
        figures = train_and_evaluate(config, workdir, run=built[row], interruption=interruption())
        minutes = training_minutes(read_metrics(workdir), config.batch_size)
        results.append(Result(row, seed, figures["top1"], figures["loss"], minutes, _devices()))
        if jax.process_index() == 0:
            content = appearing.to_json({"results": [asdict(result) for result in results]})
            files.replace_file(directory / RESULTS, content)
    return [result for result in results if (result.row, result.seed) in wanted]


def read_results(directory: Path) -> list[Result]:
    """Returns the results of the runs that are finished, in the order in which they were.

    Raises:
      UserError: the file that holds them is damaged.
    """
    path = directory / RESULTS
    if not path.exists():
        return []
    try:
        return [Result(**values) for values in files.read_json(path)["results"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"cannot read {path}: {error}; delete it, and the runs tell again what they found"
        ) from error


def workdir_of(directory: Path, row: str, seed: int) -> Path:
    """Returns the workdir of a run: ``plus_layerscale/seed0`` for the row ``+ LayerScale``."""
    name = re.sub(r"[^a-z0-9.]+", "_", row.lower().replace("+", "plus ")).strip("_")
    return directory / name / f"seed{seed}"


def training_minutes(lines: Lines, batch_size: int) -> float:
    """Returns how long the steps in ``metrics.jsonl`` took, by the throughput of each interval."""
    seconds, before = 0.0, 0
    for line in lines:
        if "images_per_second" in line:
            seconds += (line["step"] - before) * batch_size / line["images_per_second"]
            before = line["step"]
    return seconds / 60


def _devices() -> str:
    """Returns what computes, such as ``8 × TPU v5e`` or ``2 cores of AMD EPYC with AVX2``."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    unit = machine.vector_unit()
    cores = usable_cores()
    return f"{cores} core{'s' * (cores > 1)} of {machine.cpu_model()}" + f" with {unit}" * bool(unit)


def _with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.seed = seed
    return changed
