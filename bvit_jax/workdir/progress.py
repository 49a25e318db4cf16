"""How a run shows its progress: a live line on a terminal, or lines of a log."""

import math
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bvit_jax.workdir.metrics import Number

UNSHOWN = ("images_per_second_per_chip", "memory_gb", *(f"level_{i}" for i in range(4)))
BAR = 20  # columns


class ProgressLine:
    """A live line with a bar on a terminal; where stderr is no terminal it does nothing.

    Args:
      total: steps of the run.
      step: steps already done.
    """

    def __init__(self, total: int, step: int = 0) -> None:
        self.active = sys.stderr.isatty()
        self._total = total
        if self.active:
            self._progress = Progress(
                BarColumn(bar_width=BAR),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                refresh_per_second=2,
            )
            description = format_line(step, total, {})
            self._task = self._progress.add_task(description, total=total, completed=step)
            self._progress.start()

    def update(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Shows the bar, the step, the time left, and of the latest means what the terminal has room for."""
        if self.active:
            left = f"{_duration(metrics['seconds_left'])} left" if "seconds_left" in metrics else ""
            shown = {name: value for name, value in metrics.items() if name != "seconds_left"}
            first, *others = _parts(step, self._total, shown)
            description = "  ".join(filter(None, (first, left)))
            for part in others:
                if BAR + 2 + len(description) + len(part) >= self._progress.console.width:
                    break
                description += f"  {part}"
            self._progress.update(self._task, completed=step, description=description)

    def close(self) -> None:
        """Leaves the last line on the screen."""
        if self.active:
            self._progress.stop()


def format_line(step: int, total: int, metrics: Mapping[str, Number]) -> str:
    """Returns one line for the log: the step, then the metrics, known ones with their units.

    Known are ``epoch``, ``loss``, ``learning_rate``, ``images_per_second``, ``seconds_left`` and the totals
    of the network's health, shown in that order; the others follow as given, except for some that only the
    files hold.
    """
    return "  ".join(_parts(step, total, metrics))


def _parts(step: int, total: int, metrics: Mapping[str, Number]) -> list[str]:
    known = {
        "epoch": lambda x: f"epoch {x:.2f}",
        "loss": lambda x: f"loss {x:.4f}",
        "learning_rate": lambda x: f"learning rate {x:.3g}",
        "images_per_second": lambda x: f"{x:.1f} images/s" if x < 100 else f"{x:.0f} images/s",
        "seconds_left": lambda x: f"{_duration(x)} left",
        "flipped": lambda x: f"flipped {100 * x:.3g} %",
        "active_weights": lambda x: f"active weights {100 * x:.3g} %",
        "active_inputs": lambda x: f"active inputs {100 * x:.3g} %",
        "zeros": lambda x: f"zeros {100 * x:.3g} %",
        "dead_heads": lambda x: f"dead heads {x}",
        "nonpositive_scales": lambda x: f"nonpositive scales {x}",
    }
    parts = [f"step {step}/{total}"]
    parts += [show(metrics[name]) for name, show in known.items() if name in metrics]
    others = {name: value for name, value in metrics.items() if name not in known and name not in UNSHOWN}
    if not others.get("bad_images", 1):
        del others["bad_images"]
    parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in others.items()]
    return parts


def _duration(seconds: Number) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
