"""Windows, metrics.jsonl, TensorBoard files and the progress line."""

import errno
import io
import json
import math
import re
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bvit_jax import files
from bvit_jax.errors import UserError
from bvit_jax.workdir.metrics import MetricWindow, MetricWriter
from bvit_jax.workdir.progress import ProgressLine, format_line
from bvit_jax.workdir.weights_and_biases import Offline


def steps(count=50):
    values = 10 ** np.random.default_rng(0).uniform(-6, 6, count)
    return [{"loss": jnp.float32(x), "accuracy": jnp.bfloat16(x)} for x in values]


def test_window_means_in_float64():
    window = MetricWindow()
    assert window.mean() == {}
    for number, step in enumerate(steps()):
        window.add(number, step)
    losses = [float(step["loss"]) for step in steps()]
    assert window.mean()["loss"] == pytest.approx(math.fsum(losses) / 50, rel=1e-15)
    assert window.mean() == window.mean()
    window.reset()
    assert window.mean() == {}


def test_window_resumes_bit_identically():
    whole, first, second = MetricWindow(), MetricWindow(), MetricWindow()
    for step in steps():
        whole.add(0, step)
    for step in steps()[:23]:
        first.add(0, step)
    second.add(0, {"loss": jnp.float32(1e9)})  # replaced by what is restored
    second.restore(json.loads(json.dumps(first.state())))
    for step in steps()[23:]:
        second.add(0, step)
    assert second.mean() == whole.mean()
    assert second.state() == whole.state()


def test_window_add_waits_for_no_more_than_an_earlier_step(monkeypatch):
    window = MetricWindow()
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    with jax.transfer_guard_device_to_host("disallow"):
        for step in steps(3):
            window.add(0, step)
    assert [len(waited), *waited] == [1, window._pending[0][1]]  # of three steps, for the first
    window.add(1, {"loss": 0.5, "accuracy": np.float32(1)})
    assert window.state()["loss"][1] == 4


def test_window_finds_the_first_value_that_is_not_finite():
    window = MetricWindow()
    for number, value in ((7, 1.0), (8, math.inf), (9, math.nan)):
        window.add(number, {"loss": jnp.float32(1), "gradient_norm": jnp.float32(value)})
        assert window.not_finite is None  # not asked yet
    window.mean()
    assert window.not_finite == ("gradient_norm", 8)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_writer_appends_lines(tmp_path):
    writer = MetricWriter(tmp_path, active=True)
    writer.write(10, {"loss": 0.1 + 0.2, "epoch": 1, "accuracy": np.float32(0.1)})
    first = '{"step": 10, "accuracy": 0.10000000149011612, "epoch": 1, "loss": 0.30000000000000004}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == first  # before it is closed
    writer.write(20, {"loss": math.nan, "norm": math.inf})
    writer.close()
    again = MetricWriter(tmp_path, active=True)
    again.write(30, {})
    again.close()
    assert lines(tmp_path)[1:] == [{"step": 20, "loss": None, "norm": None}, {"step": 30}]


def test_writer_truncates_when_a_run_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a": 1}\n{"step": 2, "e": 1}\n{"step": 3}\n{"step": 4, "lo')
    writer = MetricWriter(tmp_path, active=True)
    assert writer.lines == 4
    writer.truncate(2, 2)
    assert writer.lines == 2
    writer.write(3, {"a": 2.0})
    assert writer.lines == 3
    writer.close()
    assert lines(tmp_path) == [{"step": 1}, {"step": 2, "a": 1}, {"step": 3, "a": 2.0}]
    writer = MetricWriter(tmp_path, active=True)
    writer.truncate(7, 9)  # some were lost
    assert writer.lines == 3
    writer.truncate(0, 0)
    assert path.read_text() == ""
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("damage", "left", "copied"),
    [
        (lambda text: text[:-8], [1, 2], True),  # power loss
        (lambda text: text[: text.index('{"step": 3')], [1, 2], False),
        (lambda text: "", [], False),
        (lambda text: text.replace('{"step": 2', "\x00\x00"), [1, 3], True),
        (lambda text: text.replace('{"step": 2}', "[" * 100_000), [1, 3], True),
        (lambda text: text.replace("2", '"2"'), [1, 3], True),
        (lambda text: text.replace('{"step": 2}\n', "") + '{"step": 9}\n', [1, 3], False),  # of a later step
    ],
)
def test_lines_that_are_lost_are_said_and_nothing_is_glued_to_half_a_line(
    tmp_path, caplog, damage, left, copied
):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))
    path.write_text(damage(whole))
    before = path.read_text()
    writer = MetricWriter(tmp_path, active=True)
    writer.truncate(3, 3)
    writer.write(4, {})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [*left, 4]
    assert writer.lines == len(left) + 1
    assert f"has lost {3 - len(left)} of 3 lines" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").exists() == copied
    if copied:
        assert (tmp_path / "metrics.jsonl.damaged").read_text() == before


def test_lines_are_on_the_disk_before_a_checkpoint_counts_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        files.os, "fsync", lambda file: synced.append((tmp_path / "metrics.jsonl").read_text())
    )
    writer = MetricWriter(tmp_path, active=True)
    writer.write(4, {})
    writer.close()
    assert synced[-1] == '{"step": 4}\n'


def test_inactive_writer_writes_nothing(tmp_path):
    writer = MetricWriter(tmp_path, active=False)
    writer.truncate(0, 0)
    writer.write(1, {"loss": 1.0})
    writer.write_layers(1, {"zeros": {"a": 1.0}})
    writer.add_images(1, "batch", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_writer_needs_a_directory(tmp_path):
    with pytest.raises(UserError, match=r"^cannot write [^\n]*metrics.jsonl: No such file"):
        MetricWriter(tmp_path / "absent", active=True)


def test_writer_does_not_start_anew(tmp_path):
    writer = MetricWriter(tmp_path, active=True)
    writer.write(1, {})
    writer.path.unlink()
    with pytest.raises(UserError, match=r"^cannot write [^\n]*metrics.jsonl: No such file"):
        writer.write(2, {})
    writer.close()
    assert not writer.path.exists()


def events(tmp_path):
    """Returns {(step, tag): value} and the steps at which sessions start."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    scalars, starts = {}, []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the record, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                scalars[event.step, value.tag] = value.simple_value
            if event.session_log.status:
                starts.append(event.step)
    return scalars, starts


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = MetricWriter(tmp_path, active=True)
    writer.truncate(0, 4)
    writer.write(5, {"loss": 0.5, "bad": math.nan})
    writer.close()
    scalars, starts = events(tmp_path)
    assert scalars[5, "loss"] == 0.5
    assert math.isnan(scalars[5, "bad"])
    assert starts == [5]


def test_tensorboard_without_room(tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboardX")
    writer = MetricWriter(tmp_path, active=True)
    writer.write(1, {"loss": 0.5})

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", fail)
    for step in range(2, 30):
        writer.write(step, {"loss": 0.5, "accuracy": 0.5})
    writer.close()
    assert len(lines(tmp_path)) == 29
    assert caplog.messages == ["TensorBoard's file is not written any longer: No space left on device"]


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    writer = MetricWriter(tmp_path, active=True)
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": 0.5})
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


LAYERS = {"flipped": {"b/a": 0.123456, "a": 1e-7}, "dead_heads": {"b": 2.0}}


def test_figures_of_layers(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = MetricWriter(tmp_path, active=True)
    writer.write_layers(5, LAYERS)
    writer.write_layers(6, {})
    writer.close()
    rounded = {"flipped": {"b/a": 0.1235, "a": 1e-7}, "dead_heads": {"b": 2.0}}
    assert lines(tmp_path) == [{"step": 5, "health": rounded}]
    scalars, _ = events(tmp_path)
    assert scalars[5, "health/dead_heads/b"] == 2
    assert scalars[5, "health/flipped/b/a"] == pytest.approx(0.123456)


@pytest.mark.parametrize("installed", [True, False])
def test_images(tmp_path, monkeypatch, installed):
    if installed:
        pytest.importorskip("tensorboardX")
    else:
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    grid = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    writer = MetricWriter(tmp_path, active=True)
    writer.add_images(1, "batch", 255 - grid)
    writer.add_images(2, "batch", grid)
    writer.close()
    with Image.open(tmp_path / "batch.png") as image:
        np.testing.assert_array_equal(np.asarray(image), grid)
    if installed:
        scalars, _ = events(tmp_path)
        assert set(scalars) == {(1, "batch"), (2, "batch")}


def test_a_picture_replaces_a_link(tmp_path):
    (tmp_path / "somebody's.png").write_text("a photograph")
    (tmp_path / "batch.png").symlink_to(tmp_path / "somebody's.png")
    writer = MetricWriter(tmp_path, active=True)
    writer.add_images(1, "batch", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert (tmp_path / "somebody's.png").read_text() == "a photograph"
    assert not (tmp_path / "batch.png").is_symlink()
    with Image.open(tmp_path / "batch.png") as image:
        assert image.size == (2, 2)


def test_images_without_room(tmp_path):
    (tmp_path / "batch.png").mkdir()
    writer = MetricWriter(tmp_path, active=True)
    with pytest.raises(UserError, match=r"^cannot write [^\n]*batch.png: Is a directory"):
        writer.add_images(1, "batch", np.zeros((2, 2, 3), np.uint8))


def test_format_line():
    metrics = {
        "accuracy": 0.123456,
        "seconds_left": 3725.4,
        "images_per_second": 1534.4,
        "learning_rate": 0.0005,
        "loss": 4.21304,
        "epoch": 1.5,
    }
    assert format_line(1200, 75000, metrics) == (
        "step 1200/75000  epoch 1.50  loss 4.2130  learning rate 0.0005  1534 images/s"
        "  1:02:05 left  accuracy 0.1235"
    )
    assert format_line(1, 2, {}) == "step 1/2"
    health = {"flipped": 0.00123, "active_inputs": 0.7, "active_weights": 1.0, "zeros": 0.0, "dead_heads": 3}
    assert format_line(1, 2, health) == (
        "step 1/2  flipped 0.123 %  active weights 100 %  active inputs 70 %  zeros 0 %  dead heads 3"
    )
    levels = {"nonpositive_scales": 1, "level_0": 0.5, "level_3": 0.5}
    assert format_line(1, 2, levels) == "step 1/2  nonpositive scales 1"
    rest = {"bad_images": 0, "memory_gb": 1.0, "memory_peak_gb": 2.0, "gradient_norm": 0.5}
    assert format_line(1, 2, rest) == "step 1/2  memory peak gb 2  gradient norm 0.5"
    assert format_line(1, 2, {"bad_images": 3}) == "step 1/2  bad images 3"
    odd = format_line(1, 2, {"loss": math.nan, "seconds_left": math.inf, "images_per_second": 1.26})
    assert odd == "step 1/2  loss nan  1.3 images/s  ? left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    progress = ProgressLine(total=100, step=40)
    progress.update(50, {"loss": 1.25, "learning_rate": 1e-3, "seconds_left": 9.0})
    progress.close()
    assert "step 50/100  0:00:09 left  loss 1.2500  learning rate 0.001" in terminal.getvalue()


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_bar_and_time_left_are_seen_whatever_is_logged(columns, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    known = {"epoch": 1.5, "loss": 2.25, "learning_rate": 1e-3, "images_per_second": 123.4}
    metrics = {**known, "seconds_left": 3725.0, **{f"an example of a metric {i}": i for i in range(9)}}
    progress = ProgressLine(total=75_000, step=0)
    progress.update(37_500, metrics)
    progress.close()
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", terminal.getvalue()).splitlines()[-1]
    assert re.match(r"\r?[━╸╺ ]{20} step 37500/75000  1:02:05 left  epoch 1.50  loss 2.2500", last), last
    assert columns - 30 < len(last.strip()) <= columns


def test_no_progress_without_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = ProgressLine(total=100)
    progress.update(50, {"loss": 1.25})
    progress.close()
    assert not progress.active
    assert stream.getvalue() == ""


def test_weights_and_biases_offline(tmp_path):
    ids = []
    for start in (0, 4):  # a run, and its continuation
        tracker = Offline(tmp_path, "digits", {"seed": 3})
        writer = MetricWriter(tmp_path, active=True, tracker=tracker)
        writer.write(start + 1, {"loss": 2.5})
        writer.write_layers(start + 1, {"zeros": {"a": 0.25}})
        writer.add_images(start + 2, "batch", np.zeros((4, 6, 3), np.uint8))
        writer.close()
        writer.write(start + 3, {"loss": 1.0})  # nothing more
        # Of two that start in the same second, the second directory has -1 at its end.
        ids.append({path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")})
    assert ids[0] == ids[1]
    assert len(ids[1]) == 1
    files = [*(tmp_path / "wandb").rglob("*.wandb")]
    content = b"".join(file.read_bytes() for file in files)
    assert len(files) == 2
    assert all(word in content for word in (b"loss", b"health/zeros/a", b"media/images/batch", b"seed"))


def test_weights_and_biases_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.wandb_project needs wandb; pip install 'bvit_jax\[wandb\]'"):
        Offline(tmp_path, "digits", {})


def test_weights_and_biases_that_fails_ends_no_run(tmp_path, monkeypatch, caplog):
    tracker = Offline(tmp_path, "digits", {})

    def fail(*_):
        raise RuntimeError("no service")

    monkeypatch.setattr(tracker._run, "log", fail)
    for step in (1, 2):
        tracker.add(step, {"loss": 1.0}, {})
    tracker.close()
    said = [record.message for record in caplog.records if record.name.startswith("bvit_jax")]
    assert said == ["Weights & Biases' files are not written any longer: no service"]
