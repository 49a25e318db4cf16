"""What a run carries beside its arrays, read by this and other versions, and what it says of the workdir."""

import math
from pathlib import Path

import pytest

from bvit_jax.errors import UserError
from bvit_jax.training.record import VERSION, Record


def test_a_record_of_another_version() -> None:
    record = Record(bad_images=3)
    values = record.to_json()
    assert Record.from_json(values).to_json() == values
    old = {name: value for name, value in values.items() if name != "version"}
    assert Record.from_json(old | {"removed": 1}).bad_images == 3
    with pytest.raises(UserError, match="was continued by a later version of this package"):
        Record.from_json(values | {"version": VERSION + 1})


def test_a_value_that_is_not_finite_says_what_the_workdir_holds(tmp_path: Path) -> None:
    record = Record()
    record.add(7, {"loss": math.nan}, 0, evaluated=True)  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"^loss is not finite at step 7; nothing was saved before: lower"):
        record.means(tmp_path)
    for step in (2, 5):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "checksums.json").touch()
    with pytest.raises(UserError, match=r"; the newest checkpoint in \S+ is of step 5: lower"):
        record.means(tmp_path)
