"""Runs in this process, on programs that are compiled once: stopped or copied at any of their events."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from bvit_jax.runtime.feed import Feed
from bvit_jax.runtime.interruption import Interruption
from bvit_jax.training import loop
from bvit_jax.training.loop import train_and_evaluate
from bvit_jax.training.run_log import RunLog
from bvit_jax.training.setup import Run, build, open_splits
from bvit_jax.workdir import checkpoint
from bvit_jax.workdir.checkpoint import Checkpoints
from bvit_jax.workdir.metrics import MetricWriter
from tests.configs import tiny
from tests.processes import metrics_of

# Where a run may be killed: before and after each of these.
EVENTS: dict[str, tuple[Any, str]] = {
    "feed": (Feed, "next"),
    "log": (RunLog, "step"),
    "write": (MetricWriter, "write"),
    "save": (Checkpoints, "save"),
    "checksums": (checkpoint, "finish"),
    "evaluation": (loop, "evaluate_state"),
    "record": (checkpoint, "write_replacement"),
}


class Terminal(io.StringIO):
    """Stands in for a stderr on which progress is shown."""

    def isatty(self) -> bool:
        """Says that it is one."""
        return True


class Notice(Interruption):
    """Stands in for SIGTERM, which it pretends to have come at some call of `reached`, from 1 on."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.calls, self._at = 0, at

    def reached(self) -> bool:
        """Counts the calls."""
        self.calls += 1
        self._noticed = self._noticed or self.calls == self._at
        return self._noticed


def short_config(data_dir: Path, variant: str = "") -> ConfigDict:
    """Returns the configuration of eight steps of few images: evaluated at 4 and 8, saved every 3."""
    config = tiny.get_config(variant)
    config.data.data_dir = str(data_dir)
    config.data.train_split, config.data.eval_split = "train[:160]", "test[:45]"
    config.batch_size, config.eval_batch_size = 40, 16
    config.log_every_steps, config.checkpoint.every_steps = 2, 3
    return config


class Trained:
    """A configuration with programs that are compiled once, and the workdir of its unbroken run."""

    def __init__(self, config: ConfigDict, workdir: Path, devices: int = 1) -> None:
        self.config, self.workdir = config, workdir
        self.run = self.build(devices)
        notice = Notice()
        self.printed = self.train(workdir, notice)
        self.calls = notice.calls
        self.state = self.final_state(workdir)

    def build(self, devices: int, fsdp: int = 1) -> Run:
        """Returns the programs for some devices."""
        config = self.config.copy_and_resolve_references()
        config.mesh.fsdp = fsdp
        return build(config, open_splits(config).num_examples, jax.devices()[:devices])

    def train(self, workdir: Path, notice: Notice | None = None, run: Run | None = None) -> dict[str, Any]:
        """Starts or continues a run."""
        return train_and_evaluate(self.config, workdir, run=run or self.run, interruption=notice or Notice())

    def final_state(self, workdir: Path) -> dict[str, np.ndarray]:
        """Returns every array of the newest checkpoint."""
        checkpoints = Checkpoints(workdir, keep=self.config.checkpoint.keep)
        restored = checkpoints.restore(self.run.state)
        checkpoints.close()
        assert restored is not None
        leaves = jax.tree_util.tree_leaves_with_path(restored[0])
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def assert_continues(self, workdir: Path) -> None:
        """Asserts that a broken run ends as the unbroken one, by the same way, bit for bit."""
        assert self.train(workdir) == self.printed
        assert metrics_of(workdir) == metrics_of(self.workdir)
        kept = [sorted(path.name for path in (d / "checkpoints").iterdir()) for d in (workdir, self.workdir)]
        assert set(kept[0]) >= set(kept[1])
        assert len(kept[0]) <= len(kept[1]) + 1  # killed just before it deleted one that is not kept
        state = self.final_state(workdir)
        assert state.keys() == self.state.keys()
        for name, array in self.state.items():
            np.testing.assert_array_equal(state[name], array, err_msg=name)


def at_events(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[str, int], None], names: tuple[str, ...] = tuple(EVENTS)
) -> None:
    """Calls ``call`` with the name and the number of every event of runs, before and after it."""
    count = 0

    def patch(name: str) -> None:
        owner, attribute = EVENTS[name]
        original = getattr(owner, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            call(f"before {name}", count)
            result = original(*args, **kwargs)
            count += 1
            call(f"after {name}", count)
            return result

        monkeypatch.setattr(owner, attribute, wrapped)

    for name in names:
        patch(name)


def copy_as_it_is(source: Path, target: Path) -> None:
    """Copies a directory that is being written to: what a kill at this moment would leave."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        try:
            if path.is_dir():
                copy.mkdir(parents=True, exist_ok=True)
            else:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        except FileNotFoundError:  # it got another name meanwhile
            continue
