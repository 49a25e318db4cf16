"""What a training run left behind, read as a model: ``config.json``, class names, a checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import models, weights
from bvit_jax.errors import UserError
from bvit_jax.files import in_bucket, read_json, replace_file
from bvit_jax.weights.class_names import default_class_names, readable_class_names
from bvit_jax.weights.formats import FORMATS, reference
from bvit_jax.weights.preprocessing import Preprocessing
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.state_dicts import Variables, abstract_variables, to_state_dict
from bvit_jax.weights.tensor_files import sha256
from bvit_jax.workdir.checkpoint import FOLDER, Kind, restore_variables
from bvit_jax.workdir.checksums import CHECKSUMS

CLASSES_FILE = "classes.json"


def create_model(config: ConfigDict, mesh: Mesh, *, train: bool) -> nn.Module:
    """Returns the model of a run, executing as `bvit_jax.models.choose` chooses for its devices.

    Raises:
      UserError: settings do not fit together or the devices.
    """
    execution = models.choose(config, mesh, train=train)
    return models.create_model(config.model, jnp.dtype(config.compute_dtype), execution)


def load_model(
    path: Path,
    *,
    kind: Kind | None = None,
    ema: bool | None = None,
    new_classes: int | None = None,
    **options: Any,
) -> Pretrained:
    """Reads a model from a run's directory, or from whatever `bvit_jax.weights.load` reads.

    Args:
      path: the directory of a run, or another directory or file.
      kind: which checkpoint of a run, the latest if None.
      ema: whether to take the moving average of a run; if None, where it keeps one.
      new_classes: see `bvit_jax.weights.load`; a run has a classifier.
      options: for `bvit_jax.weights.load`.

    Raises:
      UserError: see there; and options are given that mean nothing for what is there.
    """
    if not is_run(path):
        if in_bucket(path):
            raise UserError(f"{path} is no training run; copy what is there to a local path, or mount it")
        if kind is not None:
            raise UserError(f"{path} is no training run, of which the {kind} checkpoint could be taken")
        if ema is not None:
            raise UserError(
                f"{path} is no training run, which could keep a moving average; leave out --noema"
            )
        return weights.load(path, new_classes=new_classes, **options)
    if any(options.values()):
        raise UserError(f"{path} is a training run, which describes itself; leave out the options for files")
    return load_run(path, kind or "latest", ema)


def is_run(path: Path) -> bool:
    """Returns whether a path is the directory of a training run."""
    if not (path / FOLDER).is_dir():
        return False
    try:
        values = read_json(path / "config.json")
    except (OSError, ValueError):
        return True  # a damaged one
    return not isinstance(values, dict) or not {"model_type", "architecture", "format"} & values.keys()


def use_average(workdir: Path, config: ConfigDict, ema: bool | None) -> bool:
    """Returns whether to take the moving average of a run: as asked, else where it keeps one.

    Raises:
      UserError: it is asked for and the run keeps none.
    """
    kept = config.ema.decay > 0
    if ema and not kept:
        raise UserError(
            f"the run in {workdir} keeps no moving average, since its config.ema.decay is 0; leave out --ema"
        )
    return kept if ema is None else ema


def load_run(workdir: Path, kind: Kind, ema: bool | None = None) -> Pretrained:
    """Reads the newest or best checkpoint of a run as a model.

    Args:
      workdir: the directory of the run.
      kind: "latest" or "best".
      ema: whether to take the moving average; if None, where the run keeps one.

    Raises:
      UserError: there is no such checkpoint or average, or it is damaged.
    """
    config = config_lib.load(workdir / "config.json")
    config.model.name = models.current_name(config.model.name)
    preprocessing = _preprocessing(config, workdir)
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())
    ema = use_average(workdir, config, ema)
    variables, step = restore(workdir, config, kind, everywhere, ema=ema)
    variables = jax.tree.map(np.asarray, variables)
    if not variables["batch_stats"]:
        del variables["batch_stats"]
    names = readable_class_names(read_class_names(workdir, config.model.num_classes))
    saved = Path(FOLDER) / str(step)
    try:
        entry = {"file": str(saved), "sha256": sha256(workdir / saved / CHECKSUMS), "format": "run"}
    except UserError:
        if (workdir / saved / CHECKSUMS).exists():
            raise
        return load_run(workdir, kind, ema)  # it is not kept any longer by a run that goes on
    if ema:
        entry["weights"] = "ema"
    return Pretrained(
        config=config.model,
        variables=variables,
        preprocessing=preprocessing,
        class_names=names,
        history=(entry,),
        bookkeeping=_batches_seen(config.model, variables, step * config.accumulate_steps),
        bookkeeping_format=reference.NAME,
    )


def restore(
    workdir: Path, config: ConfigDict, kind: Kind, sharding: Any, *, ema: bool = False
) -> tuple[Variables, int]:
    """Returns parameters and running statistics of a checkpoint, placed by ``sharding``, and its step.

    With ``ema`` they are those of the moving average.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or does not fit the configuration.
    """
    abstract = abstract_variables(models.create_model(config.model), config.model.image_size)
    abstract.setdefault("batch_stats", {})
    fields = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"ema": abstract} if ema else abstract,
    )
    restored = restore_variables(workdir, fields, kind)
    if restored is None:
        other = "; the other kind, latest, may be there" if kind == "best" else ""
        raise UserError(f"no {kind} checkpoint in {workdir}; train with train.py --workdir first{other}")
    variables, _, step = restored
    return variables["ema"] if ema else variables, step


def write_class_names(workdir: Path, names: Sequence[str]) -> None:
    """Writes the names of the classes into a run's directory."""
    replace_file(workdir / CLASSES_FILE, (json.dumps(list(names), indent=0) + "\n").encode())


def read_class_names(workdir: Path, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes of a run as its data set has them.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / CLASSES_FILE
    if not path.exists():  # of an older version
        return default_class_names(num_classes)
    try:
        names = read_json(path)
        if len(names) != num_classes or not all(isinstance(name, str) for name in names):
            raise ValueError(f"it does not hold {num_classes} names")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return tuple(names)


def _preprocessing(config: ConfigDict, workdir: Path) -> Preprocessing:
    try:
        data, size = config.data, config.model.image_size
        resize = config_lib.eval_resize(data, size)
        return Preprocessing(resize, size, data.eval_interpolation, data.mean, data.std)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the config.json in {workdir} does not describe the images: {error}") from error


def _batches_seen(config: ConfigDict, variables: Variables, batches: int) -> dict[str, np.ndarray]:
    """Returns the counters that PyTorch's batch norms would hold after so many (micro)batches."""
    if config.name not in reference.MODELS or config.get("distillation_token"):
        return {}
    arrays = FORMATS[reference.NAME].constants(config, to_state_dict(variables))
    return {
        name: np.array(batches, np.int64) if name.endswith("num_batches_tracked") else array
        for name, array in arrays.items()
    }
