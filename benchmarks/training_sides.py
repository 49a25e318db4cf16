"""The two sides of `against_pytorch`: our training step, and the PyTorch code's, on the same batches."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bvit_jax import data, models, optim, weights
from bvit_jax.augment.normalization import Normalization
from bvit_jax.files import local_path
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.state import TrainState
from bvit_jax.training.steps.train import Objective, TrainSettings, train_step
from bvit_jax.weights.naming import REFERENCE
from bvit_jax.weights.state_dicts import abstract_variables, from_state_dict, to_state_dict

COUNTER = "num_batches_tracked"  # of PyTorch's batch norms, which we do not have


class Teacher:
    """The model that is distilled, whose logits both sides receive."""

    def __init__(self, config: ConfigDict, dtype: Any) -> None:
        """Reads the weights that ``config.teacher`` names."""
        source = weights.load(local_path(config.teacher.path))
        self.model = models.create_model(source.config, dtype)
        self.variables = jax.tree.map(lambda array: jnp.asarray(array, dtype), source.arrays())
        self.normalize = Normalization(source.preprocessing.mean, source.preprocessing.std)
        self._apply = jax.jit(lambda v, x: _logits(self.model, v, self.normalize(x)))

    def logits(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Returns its logits for the images of a batch."""
        return np.array(self._apply(self.variables, batch["image"]))


class Ours:
    """Our training step, compiled once, on parameters of one dtype."""

    state: TrainState

    def __init__(self, config: ConfigDict, teacher: Teacher, dtype: Any) -> None:
        self._model = models.create_model(config.model, dtype)
        self._dtype = dtype
        self._abstract = abstract_variables(self._model, config.model.image_size)
        self._normalize = Normalization(config.data.mean, config.data.std)
        schedule = optim.make_schedule(
            config.optim,
            batch_size=config.batch_size,
            steps_per_epoch=steps_per_epoch(config),
            epochs=config.epochs,
        )
        optimizer = optim.make_optimizer(config.optim, schedule)
        objective = Objective(teacher.model, teacher.normalize)  # no labels, as in the scripts
        settings = TrainSettings(self._model, optimizer, Inputs(self._normalize), objective)
        self._step = jax.jit(partial(train_step, settings))
        self._optimizer, self._teacher, self._key = optimizer, teacher.variables, jax.random.key(0)
        self._hits = jax.jit(self._count_hits)

    def start(self, state: dict[str, Any]) -> None:
        """Starts a training from the arrays of the PyTorch model."""
        variables = self._variables(state)
        self.state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            opt_state=self._optimizer.init(variables["params"]),
        )

    def step(self, batch: dict[str, np.ndarray]) -> float:
        """Trains on a batch and returns its loss."""
        self.state, metrics = self._step(self.state, batch, self._teacher, self._key)
        return float(metrics["loss"])

    def loss_with(self, state: dict[str, Any], batch: dict[str, np.ndarray]) -> float:
        """Returns the loss of a batch with other parameters, those of the PyTorch model."""
        variables = self._variables(state)
        other = self.state.replace(params=variables["params"], batch_stats=variables["batch_stats"])
        return float(self._step(other, batch, self._teacher, self._key)[1]["loss"])

    def different_signs(self, state: dict[str, Any]) -> tuple[int, float]:
        """Returns how many latent weights have another sign than theirs, and the largest distance of any."""
        ours = to_state_dict({"params": self.state.params}, REFERENCE)
        flips = sum(
            int(np.sum(np.sign(_centred(array)) != np.sign(_centred(state[name]))))
            for name, array in ours.items()
            if array.ndim in (2, 4)
        )
        return flips, max(float(np.abs(array - state[name]).max()) for name, array in ours.items())

    def correct(self, batches: Iterator[dict[str, np.ndarray]]) -> float:
        """Returns the share of images that are classified correctly."""
        counts = [
            (int(self._hits(self.state.variables, batch)), int(batch["mask"].sum())) for batch in batches
        ]
        return sum(hit for hit, _ in counts) / sum(count for _, count in counts)

    def _count_hits(self, variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
        best = jnp.argmax(_logits(self._model, variables, self._normalize(batch["image"])), axis=-1)
        return jnp.sum((best == batch["label"]) & batch["mask"])

    def _variables(self, state: dict[str, Any]) -> Any:
        kept = {name: array for name, array in state.items() if not name.endswith(COUNTER)}
        return from_state_dict(kept, self._abstract, self._dtype, REFERENCE)


class Theirs:
    """Model and loss of the PyTorch code, with timm's optimiser and schedule."""

    def __init__(self, config: ConfigDict, checkout: Path, seed: int, dtype: str) -> None:
        """Builds the model, whose initial weights follow from the seed."""
        import torch

        from benchmarks import torch_side

        self._torch, self._dtype = torch, getattr(torch, dtype)
        torch.manual_seed(seed)
        self.model: Any = torch_side.build_small(checkout, config.model.to_dict()).to(self._dtype)
        self._criterion = torch_side.distillation_loss(checkout)
        self._optimizer, self._scheduler = torch_side.timm_optimizer(
            self.model, config.optim.learning_rate, config.optim.min_learning_rate, config.epochs
        )
        self._mean, self._std = (
            np.asarray(values, np.float32) for values in (config.data.mean, config.data.std)
        )

    def state(self) -> dict[str, np.ndarray]:
        """Returns a copy of its arrays."""
        return {name: tensor.numpy().copy() for name, tensor in self.model.state_dict().items()}

    def step(self, batch: dict[str, np.ndarray], teacher_logits: np.ndarray) -> float:
        """Trains on a batch and returns its loss."""
        self.model.train()
        logits = self.model(self._images(batch)).logits
        loss = self._criterion(logits, self._torch.from_numpy(teacher_logits).to(self._dtype))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def end_epoch(self, epoch: int) -> None:
        """Changes the learning rate as its ``main.py`` does."""
        self._scheduler.step(epoch)

    def correct(self, batches: Iterator[dict[str, np.ndarray]]) -> float:
        """Returns the share of images that are classified correctly."""
        self.model.eval()
        hits = count = 0
        with self._torch.no_grad():
            for batch in batches:
                best = self.model(self._images(batch)).logits.argmax(1).numpy()
                hits += int(((best == batch["label"]) & batch["mask"]).sum())
                count += int(batch["mask"].sum())
        return hits / count

    def _images(self, batch: dict[str, np.ndarray]) -> Any:
        images = (batch["image"].astype(np.float32) / 255 - self._mean) / self._std
        return self._torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(self._dtype)


def steps_per_epoch(config: ConfigDict) -> int:
    """Returns how many batches an epoch has."""
    return data.steps_per_epoch(data.open_train_split(config.data).num_examples, config.batch_size)


def _logits(model: Any, variables: Any, images: jax.Array) -> jax.Array:
    output: models.ModelOutput = model.apply(variables, images)
    return output.logits


def _centred(kernel: np.ndarray) -> np.ndarray:
    """Returns a weight of a linear layer less its rows' means, whose signs count; others as they are."""
    return kernel - kernel.mean(1, keepdims=True) if kernel.ndim == 2 else kernel
