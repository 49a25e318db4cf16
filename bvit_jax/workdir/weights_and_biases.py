"""Weights & Biases' offline files of a run, which ``wandb sync`` uploads."""

import contextlib
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bvit_jax.errors import UserError
from bvit_jax.files import in_bucket

FOLDER = "wandb"

logger = logging.getLogger(__name__)


class Offline:
    """Writes below ``wandb`` of a run's directory; of a run in a bucket, below that of the current directory.

    Nothing is sent anywhere. Every start of a run writes files of its own, with the same id, so that their
    upload is one run. After an error, which is logged, nothing more is written.

    Args:
      workdir: of the run.
      project: name of the project.
      config: of the run, as JSON values.

    Raises:
      UserError: wandb is not installed.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # here, because importing it takes a second
        except ImportError as error:
            raise UserError(
                "config.wandb_project needs wandb; pip install 'bvit_jax[wandb]', or leave it empty"
            ) from error
        logging.getLogger("wandb").propagate = False  # it has files of its own
        self._picture = wandb.Image
        directory = Path() if in_bucket(workdir) else workdir
        # Named offline-run-TIME-ID, and -1 after that for a second one of the same second.
        before = [] if in_bucket(workdir) else sorted((workdir / FOLDER).glob("offline-run-*-*"))
        self._run: Any = wandb.init(
            project=project,
            id=before[0].name.split("-")[3] if before else secrets.token_hex(4),
            name=workdir.name,
            dir=str(directory),
            config=dict(config),
            mode="offline",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True),
        )

    def add(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Writes scalars and pictures, uint8 (height, width, 3), of a step."""
        if self._run is None:
            return
        try:
            self._run.log({**scalars, **{name: self._picture(grid) for name, grid in pictures.items()}}, step)
        except Exception as error:  # its own, which are not OSError
            logger.warning("Weights & Biases' files are not written any longer: %s", error)
            self._run = None

    def close(self) -> None:
        """Writes what is in buffers, and nothing more."""
        run, self._run = self._run, None
        if run is not None:
            with contextlib.suppress(Exception):  # of its service, which is gone
                run.finish()
