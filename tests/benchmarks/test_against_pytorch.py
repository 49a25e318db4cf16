import copy
import json
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import against_pytorch
from benchmarks.training_sides import Ours, Teacher
from bvit_jax import models
from bvit_jax.weights.naming import REFERENCE
from bvit_jax.weights.state_dicts import to_state_dict


class Twin:
    """Our own step in the place of the PyTorch code.

    In float64, all weights are moved after two steps; in float32, those of the classifier before the first.
    """

    compiled: ClassVar[dict[str, Ours]] = {}
    seeds: ClassVar[dict[str, list[int]]] = {"float32": [], "float64": []}
    losses: ClassVar[list[float]] = []  # of the last one

    def __init__(self, config: Any, checkout: Any, seed: int, dtype: str) -> None:
        model = models.create_model(config.model, jnp.dtype(dtype))
        size = config.model.image_size
        variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, size, size, 3)))
        if dtype not in self.compiled:
            teacher = Teacher(config, jnp.dtype(dtype))
            self.compiled[dtype] = Ours(config, teacher, jnp.dtype(dtype))
        self._ours, self._steps, self._dtype = copy.copy(self.compiled[dtype]), 0, dtype
        self.seeds[dtype].append(seed)
        self.losses.clear()
        self._ours.start(to_state_dict(variables, REFERENCE))

    def state(self) -> dict[str, np.ndarray]:
        return to_state_dict(self._ours.state.variables, REFERENCE)

    def step(self, batch: Any, teacher_logits: np.ndarray) -> float:
        assert teacher_logits.shape == (len(batch["label"]), 10)
        self._steps += 1
        if self._dtype == "float32" and self._steps == 1:
            self._move(lambda path, x: -3 * x if path[0].key == "head" else x)
        loss = self._ours.step(batch)
        if self._dtype == "float64" and self._steps == 2:  # in the next step, the models are not the same
            self._move(lambda path, x: x + 1e-4)
        self.losses.append(loss)
        return loss

    def _move(self, change: Callable[[Any, jax.Array], jax.Array]) -> None:
        params = jax.tree.map_with_path(change, self._ours.state.params)
        self._ours.state = self._ours.state.replace(params=params)

    def end_epoch(self, epoch: int) -> None:
        pass

    def correct(self, batches: Iterator[Any]) -> float:
        return self._ours.correct(batches)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a model that compiles in seconds the one that is trained, and the twin its other side."""
    sizes = {**against_pytorch.MODELS["react_deit"], "width": 16, "depth": 1, "num_heads": 1, "mlp_dim": 16}
    monkeypatch.setattr(against_pytorch, "MODELS", {"react_deit": sizes})
    monkeypatch.setattr(against_pytorch, "Theirs", Twin)
    monkeypatch.setattr(against_pytorch, "check_reference", lambda path: None)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_follows_two_trainings_until_they_part_and_compares_their_ends(tmp_path, capsys):
    file = tmp_path / "found.json"
    arguments = ["--seeds=1", "--steps=4", "--runs=2", "--first=3", "--epochs=2", f"--json={file}"]
    assert against_pytorch.main(["--reference", str(tmp_path), *arguments]) == 0
    found: dict[str, Any] = json.loads(file.read_text())["models"]["react_deit"]
    (run,) = found["together"]
    assert (run["parted"], run["steps"], run["largest_before"]) == (3, 4, 0.0)
    assert run["difference"] > 1e-9
    assert run["parameter_distance"] == pytest.approx(1e-4, rel=1e-6)
    assert run["difference_with_their_parameters"] == 0.0
    ends = found["ends"]
    assert Twin.seeds == {"float64": [0], "float32": [2, 3]}
    assert ends["orders"] == [3, 4]
    assert ends["theirs"] == ends["theirs_by_us"]
    assert all(ours != theirs for ours, theirs in zip(ends["ours"], ends["theirs"], strict=True))
    epoch = len(Twin.losses) // 2
    assert ends["their_loss"][1] == pytest.approx(np.mean(Twin.losses[epoch:]), rel=1e-6)
    assert ends["our_loss"][1] != pytest.approx(ends["their_loss"][1], rel=1e-3)
    out = capsys.readouterr().out
    assert "| react_deit | 0 | 2 steps, to 0e+00 |" in out
    assert f"| react_deit, loss of the last epoch | | {np.mean(ends['our_loss']):.3f} |" in out


def test_the_report_of_trainings_that_stay_together():
    together = [{"seed": 0, "steps": 200, "parted": None, "largest_before": 2e-12}]
    sides = {"ours": [0.95, 0.97], "theirs": [0.96, 0.96], "theirs_by_us": [0.96, 0.96]}
    ends = {**sides, "our_loss": [1.0], "their_loss": [2.0], "paired_t": 1.0, "mann_whitney": 0.6667}
    text = against_pytorch.report({"models": {"binaryvit": {"together": together, "ends": ends}}})
    assert "| binaryvit | 0 | all 200 steps, to 2e-12 | | | |" in text
    assert "| 2 | 96.00 ± 1.41 % | 96.00 ± 0.00 % | 96.00 ± 0.00 % | p = 1.00 | p = 0.67 |" in text


def test_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert against_pytorch.main(["--reference", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: --reference is {tmp_path}: there is no models.py")
