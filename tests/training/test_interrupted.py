"""Runs that are killed or asked to stop at any of their events: each ends equal to the unbroken one."""

import dataclasses
import itertools
import json
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import pytest
from PIL import Image

from bvit_jax.data import images
from bvit_jax.errors import UserError
from bvit_jax.runtime import feed, process
from bvit_jax.runtime.interruption import Interrupted, Interruption
from bvit_jax.training import evaluation, loop
from bvit_jax.training.loop import train_and_evaluate
from bvit_jax.training.setup import build, open_splits
from bvit_jax.workdir.checkpoint import Checkpoints, restore_variables
from tests.inprocess import Notice, Terminal, Trained, at_events, copy_as_it_is, short_config
from tests.processes import metrics_of


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Trained:
    return Trained(short_config(data_dir), tmp_path_factory.mktemp("runs") / "whole")


# --- killed -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_any_event_continues_bit_for_bit(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the workdir, made at each event, is what a kill at this moment leaves."""
    copies: dict[str, Path] = {}

    def copy(name: str, number: int) -> None:
        target = tmp_path / f"{number} {name}"
        copy_as_it_is(tmp_path / "run", target)
        copies[content_of(target)] = target  # the last one has most to undo

    with monkeypatch.context() as patch:
        at_events(patch, copy, ("write", "save", "checksums", "record"))  # after which files differ
        assert whole.train(tmp_path / "run") == whole.printed
    assert len(copies) >= 6
    for path in copies.values():
        whole.assert_continues(path)


def content_of(workdir: Path) -> str:
    """Returns what a run continues from: its complete checkpoints, and what has replaced their metadata."""
    files = [path for path in sorted(workdir.rglob("*")) if path.name in {"checksums.json", "metadata.json"}]
    return json.dumps([[str(f.relative_to(workdir)), f.read_text()] for f in files])


@pytest.mark.slow
def test_a_run_killed_in_an_evaluation_has_lost_nothing(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Killed(BaseException):
        pass

    steps = []
    for workdir, kill_at in ((tmp_path / "middle", 1), (tmp_path / "end", 3)):

        def kill(name: str, number: int, kill_at: int = kill_at) -> None:
            if name == "before evaluation" and number == kill_at:
                raise Killed

        with monkeypatch.context() as patch:
            at_events(patch, kill, ("evaluation",))
            with pytest.raises(Killed):
                whole.train(workdir)
        with caplog.at_level(logging.INFO, "bvit_jax"):
            caplog.clear()
            whole.assert_continues(workdir)
        steps += [message for message in caplog.messages if message.startswith("continuing from step")]
    assert [line.split()[3] for line in steps] == ["4", "8"]


# --- asked to stop ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "step"),
    [
        (3, 3),  # saved
        (6, 4),  # at the last batch of the evaluation
        (7, 4),  # after it
        (12, 8),  # in the last evaluation
    ],
)
def test_a_notice_stops_the_run_and_nothing_is_lost(
    at: int, step: int, whole: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step};"):
        whole.train(tmp_path / "run", Notice(at))
    with caplog.at_level(logging.INFO, "bvit_jax"):
        whole.assert_continues(tmp_path / "run")
    assert f"continuing from step {step} " in caplog.text
    assert caplog.text.count("top-1") == (1 if at >= 7 else 2)


@pytest.mark.slow
def test_a_notice_after_the_last_evaluation_changes_nothing(whole: Trained, tmp_path: Path) -> None:
    assert whole.train(tmp_path / "run", Notice(whole.calls)) == whole.printed


def test_a_notice_while_compiling(whole: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notice = Notice()
    notice._noticed = True
    stops = pytest.raises(Interrupted, match="stopped by SIGTERM at step 0;")
    with caplog.at_level(logging.INFO, "bvit_jax"), stops:
        whole.train(tmp_path / "run", notice, run=whole.build(1))
    assert "compiling the training step" in caplog.text
    assert "tracing the health pass" not in caplog.text
    assert Checkpoints(tmp_path / "run", keep=1).latest_step() is None


@pytest.mark.slow
def test_ctrl_c_in_training(whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's `Interruption`, and the real signal, at step 5."""
    before = [signal.getsignal(stop) for stop in process.STOPS]

    def send(name: str, count: int) -> None:
        if count == 9:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(process, "_ours", True)
        interruption = Interruption(sigterm=True)
        at_events(patch, send, ("feed",))
        with pytest.raises(Interrupted, match="stopped by SIGINT at step 5;") as stopped:
            train_and_evaluate(whole.config, tmp_path / "run", run=whole.run, interruption=interruption)
    assert stopped.value.number == signal.SIGINT
    assert [signal.getsignal(stop) for stop in process.STOPS] == before
    whole.assert_continues(tmp_path / "run")


@pytest.mark.slow
def test_a_notice_while_no_data_come(whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that hangs keeps nothing from being saved."""
    notice, original, hang = Notice(), loop._train_batches, threading.Event()

    def batches(*arguments: Any) -> Iterator[Any]:
        yield from itertools.islice(original(*arguments), 5)
        notice._noticed = True
        hang.wait()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_batches", batches)
        patch.setattr(feed, "POLL_SECONDS", 0.01)
        patch.setattr(feed, "CLOSE_SECONDS", 0.1)
        with pytest.raises(Interrupted, match=r"at step [1-5];"):
            whole.train(tmp_path / "run", notice)
    hang.set()
    whole.assert_continues(tmp_path / "run")


@pytest.mark.slow
def test_images_that_cannot_be_loaded_after_a_notice(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes that load images get the signal too, and die of it."""
    notice = Notice()

    def fail(name: str, number: int) -> None:
        if name == "before feed" and number == 11:  # of step 6
            notice._noticed = True
            raise OSError("gone")

    with monkeypatch.context() as patch:
        at_events(patch, fail, ("feed",))
        with pytest.raises(Interrupted, match="at step 5;"):
            whole.train(tmp_path / "run", notice)
    whole.assert_continues(tmp_path / "run")


@pytest.mark.slow
def test_images_that_cannot_be_read_stop_the_run_and_the_steps_before_are_saved(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, number: int) -> None:
        if name == "before feed" and number == 11:  # of step 6
            raise UserError("gone")

    with monkeypatch.context() as patch:
        at_events(patch, fail, ("feed",))
        with pytest.raises(UserError, match="gone"):
            whole.train(tmp_path / "run")
    assert (tmp_path / "run/checkpoints/5/checksums.json").exists()
    whole.assert_continues(tmp_path / "run")


# --- damaged ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint(
    damage: str, tmp_path: Path, whole: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole.workdir, workdir)
    newest = workdir / "checkpoints" / "8"
    file = max(newest.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    file.write_bytes(content[:middle] if damage == "truncated" else flipped)
    with caplog.at_level(logging.INFO, "bvit_jax"):
        whole.assert_continues(workdir)
    assert f"checkpoint {newest} is damaged" in caplog.text
    assert "continuing from step 6 " in caplog.text


# TensorStore raises it in its threads, once per array, after Orbax has given up a checkpoint.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored.*:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("event", ["before feed", "before checksums", "after log", "before evaluation"])
def test_a_directory_that_is_gone(
    event: str, whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(name: str, number: int) -> None:
        if name == event and (tmp_path / "run" / "checkpoints" / "3").exists():
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    at_events(monkeypatch, move)
    with pytest.raises(UserError, match="cannot write "):
        whole.train(tmp_path / "run")
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_damaged_images_are_counted_and_the_count_survives(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, decode = open_splits(whole.config).source, images.decode
    encoded = [bytes(source[index]["image"]) for index in range(160)]
    damaged = {encoded[index] for index in (3, 77)}

    def fails_for_two(image: bytes) -> Image.Image:
        if image in damaged:
            raise images.ImageError("truncated")
        return decode(image)

    monkeypatch.setattr(images, "decode", fails_for_two)
    config = whole.config.copy_and_resolve_references()
    config.data.max_bad_images = 10
    for stops in (True, False):
        with pytest.raises(Interrupted, match="at step 3;") if stops else nullcontext():
            train_and_evaluate(
                config, tmp_path / "run", run=whole.run, interruption=Notice(3 if stops else 0)
            )
    counts = [line["bad_images"] for line in metrics_of(tmp_path / "run") if "loss" in line]
    an_epoch = sum(image in damaged for image in encoded)  # some images look the same
    assert 0 <= counts[0] <= counts[1] == an_epoch < counts[2] + 1
    assert counts[3] == 2 * an_epoch


# --- finished -----------------------------------------------------------------------------------


def test_a_run_writes_what_it_promises(whole: Trained) -> None:
    assert (whole.printed["step"], whole.printed["images"]) == (8, 45)
    lines = metrics_of(whole.workdir)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "eval_top1" in line] == [4, 8]
    assert lines[-1]["eval_top1"] == whole.printed["top1"]
    best = max((line for line in lines if "eval_top1" in line), key=lambda line: line["eval_top1"])
    assert (whole.printed["best_top1"], whole.printed["best_step"]) == (best["eval_top1"], best["step"])
    saved = restore_variables(whole.workdir, {"step": whole.run.state.step}, "best")
    assert saved is not None
    assert saved[2] == best["step"]


@pytest.mark.slow
def test_a_finished_run_only_reports(whole: Trained, tmp_path: Path) -> None:
    shutil.copytree(whole.workdir, tmp_path / "run")
    whole.assert_continues(tmp_path / "run")


@pytest.mark.slow
def test_the_execution_is_logged(whole: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(whole.workdir, tmp_path / "run")
    with caplog.at_level(logging.INFO, "bvit_jax"):
        whole.train(tmp_path / "run")
    (line,) = [message for message in caplog.messages if message.startswith("training executes with")]
    assert "packed=True" in line


# --- NaN ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_debug_nans_names_the_operation(data_dir: Path, tmp_path: Path) -> None:
    config = short_config(data_dir, "real")
    config.optim.learning_rate = 1e30
    run = build(config, open_splits(config).num_examples, jax.devices()[:1], donate=False)
    with pytest.raises(UserError) as error:
        train_and_evaluate(config, tmp_path / "run", run=run, debug_nans=True)
    assert str(error.value).startswith("invalid value (nan) encountered in ")
    assert ", at bvit_jax/" in str(error.value)
    assert ", called from bvit_jax/" in str(error.value)


# --- evaluation afterwards ----------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_gives_the_same_figures(whole: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "make_mesh", lambda: whole.run.mesh)
    monkeypatch.setattr(sys, "stderr", Terminal())
    for kind, step in (("latest", "step"), ("best", "best_step")):
        figures = evaluation.evaluate_workdir(whole.workdir, kind, {})
        assert figures["step"] == whole.printed[step]
        assert figures["top1"] == whole.printed["top1" if kind == "latest" else "best_top1"]
    assert "evaluating, batches" in sys.stderr.getvalue()
    latest = evaluation.evaluate_workdir(whole.workdir, "latest", {})
    assert {name: latest[name] for name in ("top5", "loss", "images")} == {
        name: whole.printed[name] for name in ("top5", "loss", "images")
    }


def test_another_model_is_refused_and_nothing_overwritten(
    whole: Trained, data_dir: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole.workdir, workdir)
    files = [workdir / name for name in ("config.json", "metrics.jsonl")]
    before = [path.read_bytes() for path in files]
    config = short_config(data_dir)
    config.model.mlp_dim = (32,)
    with pytest.raises(UserError, match=r"was trained with config.model.mlp_dim=\[16\] \(here \[32\]\), by"):
        train_and_evaluate(config, workdir)
    with pytest.raises(UserError, match="does not fit this configuration"):
        train_and_evaluate(config, workdir, allow_changes=True)
    assert [path.read_bytes() for path in files] == before


def test_another_version_of_the_data_is_refused(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole.workdir, workdir)
    split = dataclasses.replace(open_splits(whole.config), version="9.0.0")
    monkeypatch.setattr(loop, "open_splits", lambda config: split)
    with pytest.raises(UserError, match=r"started with version 1.0.0 of digits, and there is 9.0.0 now"):
        whole.train(workdir)


def test_other_images_are_refused(whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole.workdir, workdir)
    split = open_splits(whole.config)
    source = [split.source[index] for index in range(split.num_examples)]
    other = dataclasses.replace(split, source=[source[1], *source[1:]])
    monkeypatch.setattr(loop, "open_splits", lambda config: other)
    with pytest.raises(UserError, match=r"started with other images or labels in split 'train.* of digits"):
        whole.train(workdir)
