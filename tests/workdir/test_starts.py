"""A workdir that is not ours is left as it is; a run goes on as what it was."""

import errno
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax.errors import UserError
from bvit_jax.workdir import starts
from tests.configs import tiny


def content_of(directory: Path) -> dict[str, bytes | None]:
    files = {str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}
    assert files
    return files


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"model_type": "vit"}'}, "config.json is not the configuration of a run"),
        ({"config.json": '{"mine": 1}'}, "config.json is not the configuration of a run"),
        ({"config.json": ""}, "cannot read .*config.json"),
        ({"config.json": "[" * 100_000}, "cannot read .*config.json: its brackets are nested too deeply"),
        ({"classes.json": "[]"}, "holds classes.json and no run"),
        ({"metrics.jsonl": "{}\n"}, "holds metrics.jsonl and no run"),
        ({"batch.png": "mine"}, "holds batch.png and no run"),
        ({"checkpoints/1000/data": "orbax"}, "checkpoints/1000 is no checkpoint of this program"),
        (
            {"checkpoints/1000/metadata/metadata": "{}", "checkpoints/1000/state/d": ""},
            "1000 is no checkpoint",
        ),
        ({"checkpoints/1000": "a file"}, "1000 is no checkpoint"),
        ({"checkpoints/7/best_model.pth": "weights", "checkpoints/8/a/b": ""}, "7 is no checkpoint"),
    ],
)
def test_files_of_others_are_refused_untouched(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    before = content_of(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        starts.check(tmp_path, tiny.get_config(), allow_changes=True)
    assert "choose another --workdir" in str(error.value)
    assert content_of(tmp_path) == before


def test_a_path_with_brackets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"because of \[ in it; choose a --workdir"):
        starts.check(tmp_path / "lr=[0.1]", tiny.get_config(), allow_changes=False)


def test_a_step_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "15").symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match="15 is no checkpoint of this program, or leads nowhere"):
        starts.check(tmp_path, tiny.get_config(), allow_changes=False)


def test_what_does_not_disturb_a_run_is_no_reason_to_refuse(tmp_path: Path) -> None:
    starts.check(tmp_path / "absent", tiny.get_config(), allow_changes=False)
    for name in ("notes.txt", "checkpoints/pretrained/model.bin", "checkpoints/100.bak/state/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = content_of(tmp_path)
    starts.check(tmp_path, tiny.get_config(), allow_changes=False)
    assert content_of(tmp_path) == before


# --- the settings of a run ----------------------------------------------------------------------


def begun(workdir: Path) -> ConfigDict:
    """Returns the configuration of a run that has saved a step."""
    config = tiny.get_config("real")
    starts.write(workdir, config, ["a"] * 10, 0)
    checkpoint = workdir / "checkpoints" / "5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checksums.json").write_text("{}")
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 5),
        ("batch_size", 288),
        ("model.num_heads", 4),
        ("model.norm_epsilon", 1e-3),
        ("model.name", "binaryvit"),
        ("compute_dtype", "bfloat16"),
        ("data.mean", (0.1, 0.2, 0.3)),
        ("data.dataset", "other"),
        ("optim.learning_rate", 0.123),
        ("loss.label_smoothing", 0.25),
        ("epochs", 1),
    ],
)
def test_a_run_continues_as_what_it_was(key: str, value: object, tmp_path: Path) -> None:
    config = begun(tmp_path)
    before = content_of(tmp_path)
    with config.unlocked():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    with pytest.raises(UserError, match=rf"was trained with config.{key}=.*or pass --allow_changes") as error:
        starts.check(tmp_path, config, allow_changes=False)
    assert "\n" not in str(error.value)
    starts.check(tmp_path, config, allow_changes=True)
    assert content_of(tmp_path) == before


def test_what_changes_neither_model_nor_steps_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = begun(tmp_path)
    config.epochs, config.log_every_steps, config.checkpoint.keep = 9, 7, 3
    config.data.dataset += ":1.0.0"
    with caplog.at_level("INFO", "bvit_jax"):
        starts.check(tmp_path, config, allow_changes=False)
    assert sorted(caplog.messages) == [
        "continuing with config.checkpoint.keep=3, before 2",
        "continuing with config.data.dataset=digits:1.0.0, before digits",
        "continuing with config.epochs=9, before 2",
        "continuing with config.log_every_steps=7, before 3",
    ]


def test_a_run_that_has_saved_nothing_may_begin_as_anything(tmp_path: Path) -> None:
    starts.write(tmp_path, tiny.get_config("real"), ["a"], 0)
    starts.check(tmp_path, tiny.get_config(), allow_changes=False)


def test_settings_that_a_run_of_an_older_version_lacks_are_no_change(tmp_path: Path) -> None:
    config = begun(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["model"]["drop_path"], values["optim"]["rules"], values["ema"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    starts.check(tmp_path, config, allow_changes=False)


def test_the_configurations_of_all_starts_are_kept(tmp_path: Path) -> None:
    config = tiny.get_config()
    config_lib.save(config, tmp_path / "config.json")  # of an older version, which kept the last alone
    for step, seed in ((5, 1), (9, 2)):
        config.seed = seed
        starts.write(tmp_path, config, ["a"] * 10, step)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"half')  # power loss
    starts.write(tmp_path, config, ["a"] * 10, 9)
    lines = (tmp_path / "starts.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines if line != '{"half']
    assert [(line.get("step"), line["config"]["seed"]) for line in kept] == [
        (None, 0),
        (5, 1),
        (9, 2),
        (9, 2),
    ]
    assert config_lib.load(tmp_path / "config.json").seed == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "ibex", "dog"], "class 1 of the data set is 'ibex' and of the model 'dog'"),
        (["dog", "cat", "eel"], "class 0 of the data set is 'dog' and of the model 'cat'"),
        (["cat", "dog"], "the data set has 2 classes, first 'cat', and the model 3"),
    ],
)
def test_a_run_continues_on_its_own_classes(names: list[str], message: str, tmp_path: Path) -> None:
    config = tiny.get_config()
    config.model.num_classes = 3
    starts.write(tmp_path, config, ["cat", "dog", "eel"], 0)
    before = content_of(tmp_path)
    with pytest.raises(UserError, match=f"{message}; use the data that it was trained on or choose another"):
        starts.write(tmp_path, config, names, 5)
    assert content_of(tmp_path) == before
    starts.write(tmp_path, config, ["cat", "dog", "eel"], 5)


def test_files_are_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.json", "classes.json", "config.json.tmp"):
        (tmp_path / name).write_text("somebody's")
        (tmp_path / "run" / name).symlink_to(tmp_path / name)
    (tmp_path / "run" / "starts.jsonl").touch()
    starts.write(tmp_path / "run", tiny.get_config(), ["a"], 0)
    assert {(tmp_path / name).read_text() for name in ("config.json", "classes.json")} == {"somebody's"}
    assert (tmp_path / "config.json.tmp").read_text() == "somebody's"
    (tmp_path / "run" / "starts.jsonl").unlink()
    (tmp_path / "run" / "starts.jsonl").symlink_to(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot write to"):
        starts.write(tmp_path / "run", tiny.get_config(), ["a"], 0)


@pytest.mark.parametrize("fails", ["save", "append_line"])
def test_a_start_without_room_can_be_repeated(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny.get_config()
    with monkeypatch.context() as patch:
        patch.setattr(*((config_lib, fails) if fails == "save" else (starts, fails)), fail)
        with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; make room"):
            starts.write(tmp_path, config, ("a", "b"), 0)
    starts.check(tmp_path, config, allow_changes=False)
    starts.write(tmp_path, config, ("a", "b"), 0)
