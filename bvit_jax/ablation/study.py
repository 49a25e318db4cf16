"""What a study is, and how it is found by name."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bvit_jax.errors import UserError, nearest
from bvit_jax.runtime.arguments import CONFIGS

STUDIES = CONFIGS / "studies"


@dataclass(frozen=True)
class Study:
    """Configurations that are compared.

    Attributes:
      title: heading of its table.
      rows: the configuration of each row by its name; seeds come from ``seeds``.
      seeds: of the runs of a row.
      baseline: the row that the others are compared with; "" for the one above each.
    """

    title: str
    rows: Mapping[str, ConfigDict]
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str = ""

    def pairs(self) -> list[tuple[str, str]]:
        """Returns the rows that are compared: each with what it is compared with."""
        names = list(self.rows)
        if self.baseline:
            return [(name, self.baseline) for name in names if name != self.baseline]
        return list(zip(names[1:], names))

    def chosen(self, rows: Sequence[str], seeds: Sequence[int]) -> "Study":
        """Returns the study with some rows and seeds only; all for none given."""
        for name in rows:
            if name not in self.rows:
                raise UserError(f"--rows has {name!r}{nearest(name, self.rows)}")
        kept = {name: config for name, config in self.rows.items() if not rows or name in rows}
        baseline = self.baseline if self.baseline in kept else ""
        return replace(self, rows=kept, seeds=tuple(seeds) or self.seeds, baseline=baseline)

    def changed(self, settings: Mapping[str, Any]) -> "Study":
        """Returns the study with settings of all rows changed.

        Raises:
          UserError: there is no such setting, or its value is of another type.
        """
        rows = {name: config.copy_and_resolve_references() for name, config in self.rows.items()}
        for config in rows.values():
            config.lock()
            for key, value in settings.items():
                try:
                    config.update_from_flattened_dict({key: value})
                except (KeyError, AttributeError, TypeError, ValueError) as error:
                    message = error.args[0] if error.args else error
                    raise UserError(f"--set {key}={value!r}: {message}") from error
        return replace(self, rows=rows)


def load_study(text: str) -> Study:
    """Returns the study ``NAME[:ARGUMENT]`` of ``configs/studies``, or of a file like them.

    Raises:
      UserError: there is none, or the file has no ``get_study``.
    """
    name, colon, argument = text.partition(":")
    path = Path(name) if name.endswith(".py") else STUDIES / f"{name}.py"
    if not path.is_file():
        known = [file.stem for file in STUDIES.glob("[!_]*.py")]
        hint = f"; there is no file {path}" if name.endswith(".py") else nearest(name, known)
        raise UserError(f"no study {name!r}{hint}")
    spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_study"):
        raise UserError(f"{path} has no function get_study; expected a study as in configs/studies")
    study: Study = module.get_study(*[argument] * bool(colon))
    return study
