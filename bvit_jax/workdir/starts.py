"""What a start of a run finds in its workdir and what it leaves there: whose it is, and which settings."""

import json
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.files import append_line
from bvit_jax.weights.class_names import matched
from bvit_jax.workdir import runs
from bvit_jax.workdir.checkpoint_files import FOLDER, check_path, complete_steps, foreign_steps

CONFIG_FILE, STARTS_FILE = "config.json", "starts.jsonl"
OTHERS = (runs.CLASSES_FILE, "metrics.jsonl", "batch.png", STARTS_FILE)  # written after the configuration

logger = logging.getLogger(__name__)


def check(workdir: Path, config: ConfigDict, *, allow_changes: bool) -> None:
    """Looks at a workdir before anything in it is touched, and logs which settings a run continues with.

    Raises:
      UserError: it holds what another program wrote, or a run of a model or of steps that mean something
        else, and ``allow_changes`` does not allow that.
    """
    try:
        check_path((workdir / FOLDER).absolute())
        foreign = foreign_steps(workdir / FOLDER)
        continues = bool(complete_steps(workdir / FOLDER))
        found = [name for name in OTHERS if (workdir / name).exists()]
        described = (workdir / CONFIG_FILE).exists()
    except OSError as error:
        raise UserError(f"cannot read {workdir}: {error.strerror}; choose another --workdir") from error
    if foreign:
        raise UserError(
            f"{foreign[0]} is no checkpoint of this program, or leads nowhere; move it away or choose another"
            " --workdir"
        )
    if not described and found and not continues:
        raise UserError(
            f"{workdir} holds {found[0]} and no run, which has a {CONFIG_FILE}; choose another --workdir, or"
            " move that file away"
        )
    if not described:
        if continues:
            logger.warning("no %s in %s: what the run was is not known", CONFIG_FILE, workdir)
        return
    try:
        before = config_lib.load(workdir / CONFIG_FILE)
    except UserError as error:
        raise UserError(f"{error}; choose another --workdir, or move that file away") from error
    if continues:
        _check_changes(workdir, before, config, allow_changes=allow_changes)


def write(workdir: Path, config: ConfigDict, class_names: Sequence[str], step: int) -> None:
    """Writes, on the first process, configuration and classes; the configurations of all starts are kept.

    Raises:
      UserError: a file cannot be written, or the run has other classes.
    """
    if jax.process_index() > 0:
        return
    path, starts = workdir / CONFIG_FILE, workdir / STARTS_FILE
    if step > 0 and (workdir / runs.CLASSES_FILE).exists():
        try:
            known = runs.read_class_names(workdir, config.model.num_classes)
            matched(
                class_names, known, advice="use the data that it was trained on or choose another workdir"
            )
        except UserError as error:
            raise UserError(f"cannot continue the run in {workdir} on this data set: {error}") from error
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        if path.exists() and not starts.exists():  # of an older version
            append_line(starts, json.dumps({"config": config_lib.load(path).to_dict()}, default=str))
        config_lib.save(config, path)  # first: without it, a directory with other files is not a run's
        append_line(starts, json.dumps({"step": step, "time": now, "config": config.to_dict()}, default=str))
        runs.write_class_names(workdir, class_names)
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir}: {error.strerror}; make room or choose another --workdir"
        ) from error


def _check_changes(workdir: Path, before: ConfigDict, now: ConfigDict, *, allow_changes: bool) -> None:
    changes = differences(before, now)
    for key, (old, new) in changes.items():
        logger.info("continuing with config.%s=%s, before %s", key, new, old)
    kept = {key: values for key, values in changes.items() if not _is_free(key, *values)}
    if kept and not allow_changes:
        settings = ", ".join(f"config.{key}={old} (here {new})" for key, (old, new) in kept.items())
        raise UserError(
            f"the run in {workdir} was trained with {settings}, by which its model or its steps would mean"
            " something else; use its values, choose another workdir, or pass --allow_changes"
        )


def differences(before: ConfigDict, now: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns the settings whose values differ, ``{"optim.eps": (before, now)}``."""
    old, new = _flat(before), _flat(now)
    if old["model.name"] != new["model.name"]:
        return {"model.name": (old["model.name"], new["model.name"])}
    return {
        key: (old.get(key, "absent"), new.get(key, "absent"))
        for key in [*new, *(key for key in old if key not in new)]
        if old.get(key, "absent") != new.get(key, "absent")
    }


def _flat(config: ConfigDict) -> dict[str, Any]:
    model = dict(config.model)
    # Of an older version, which lacks the settings that came later.
    complete = {**models.model_config(model["name"]), **model, "name": models.current_name(model["name"])}
    sections: dict[str, Any] = {**config, "model": complete}
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        inside = isinstance(value, dict | ConfigDict)
        flat |= {f"{name}.{key}": value[key] for key in value} if inside else {name: value}
    return json.loads(json.dumps(flat, default=str))  # tuples are lists there


def _is_free(key: str, old: Any, new: Any) -> bool:
    """Returns whether a run may continue with the new value of a setting without ``--allow_changes``."""
    if key == "data.dataset":  # the version is checked with what was read
        return str(old).partition(":")[0] == str(new).partition(":")[0]
    if key == "epochs":
        return bool(new >= old)
    return key in config_lib.SETTINGS and config_lib.SETTINGS[key].free
