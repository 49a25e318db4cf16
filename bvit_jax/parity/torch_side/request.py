"""One request: which model with which weights on which images, and the golden file of it."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from .checkout import git_commit
from .checkpoint import load, read_checkpoint, settings_of, sha256
from .codes import ARGS, CODES
from .errors import Refused, one_line
from .randomise import randomise
from .record import run

COMPACT = 4096  # elements from which a compact file stores an output in float32


class Request:
    """One request with everything resolved: the checkpoint, the arguments, the configuration."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.repo: str = request["repo"]
        self.checkpoint: str | None = request["checkpoint"]
        self.images: str | None = request["images"]
        self.batch: int = request["batch"]
        self.seed: int = request["seed"]
        self.compact: bool = request["compact"]
        self.out: str = request["out"]
        self.state: dict[str, torch.Tensor] | None = None
        code = CODES[request["code"]]
        settings = request["settings"]
        if self.checkpoint is not None:
            self.state, args = read_checkpoint(self.checkpoint)
            if settings is None:
                settings = code.from_args(settings_of(args, self.checkpoint, ARGS[request["code"]]))
            elif code.class_bias in self.state:
                settings = {**settings, code.classes_key: len(self.state[code.class_bias])}
        self.subject = code(self.repo, settings, request["overrides"])

    def description(self) -> dict[str, Any]:
        """Returns what must be known before images can be made."""
        return {"image_size": self.subject.image_size}

    def meta(self) -> dict[str, Any]:
        """Returns the ``meta`` of the golden file; the patches are known once the model is built."""
        meta = self.subject.meta()
        meta |= {"weights_dtype": self.weights_dtype(), "seed": self.seed, "torch": torch.__version__}
        if self.subject.patches:
            meta["patches"] = self.subject.patches
        if commit := git_commit(self.repo):
            meta["commit"] = commit
        if self.checkpoint is not None:
            meta["checkpoint"] = os.path.basename(self.checkpoint)
            meta["checkpoint_sha256"] = sha256(self.checkpoint)
        return meta

    def weights_dtype(self) -> str:
        """Returns the narrowest dtype that holds weights and images exactly."""
        if self.state is None:
            return "float16"
        wide = any(array.dtype == torch.float64 for array in self.state.values())
        return "float64" if wide else "float32"

    def model(self) -> nn.Module:
        """Returns the checkout's model in float64, with the checkpoint's weights or initial ones."""
        torch.manual_seed(self.seed)
        try:
            model = self.subject.build().double()
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"the checkout cannot build the model: {one_line(error)}") from error
        if self.state is not None:
            load(model, self.state)
        return model


def compact(arrays: dict[str, np.ndarray], weights_dtype: str) -> dict[str, np.ndarray]:
    """Returns the arrays in the dtypes of the smallest file that is still checked in float64."""

    def narrow(name: str, array: np.ndarray) -> np.ndarray:
        if array.dtype != np.float64:
            return array
        if name.startswith(("state/", "state2/", "input/")):
            return array.astype(weights_dtype)
        return array.astype(np.float32) if array.size > COMPACT else array

    return {name: narrow(name, array) for name, array in arrays.items()}


def dump(request: Request) -> None:
    """Runs the model and writes the golden file."""
    subject, dtype, rng = request.subject, request.weights_dtype(), np.random.default_rng((request.seed, 1))
    request.meta()  # refuses what no file can describe, before anything is built
    model = request.model()
    if request.images is not None:
        images = np.load(request.images)
    else:
        size = subject.image_size
        images = rng.standard_normal((request.batch, 3, size, size))
    # Rounded, because the weights' dtype is the one in which a model must be able to load them.
    images = images.astype("float16" if dtype == "float16" else "float32").astype(np.float64)
    inputs = {"images": images, **subject.inputs(len(images), rng)}
    try:
        if request.state is None:
            randomise(subject, model, torch.from_numpy(images), np.random.default_rng(request.seed))
        moved = np.random.default_rng((request.seed, 2)) if request.state is None else None
        arrays = run(subject, model, inputs, dtype, moved)
    except Exception as error:
        raise Refused(f"the checkout cannot run the model: {one_line(error)}") from error
    if request.compact:
        arrays = compact(arrays, dtype)
    meta = request.meta()
    save = np.savez_compressed if request.compact else np.savez
    with open(request.out, "wb") as file:
        save(file, meta=np.array(json.dumps(meta)), **arrays)  # type: ignore[arg-type]
