import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from bvit_jax import data
from bvit_jax.data import images, pipeline
from bvit_jax.data.pipeline import repeated_index
from bvit_jax.errors import UserError

Batches = Generator[data.Batch, None, None]
MakeConfig = Callable[..., ConfigDict]


def _take(batches: Batches, count: int) -> list[data.Batch]:
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def _rows(batch_size: int, host: int, hosts: int) -> range:
    """The rows of a global batch that one of some hosts holds."""
    share = batch_size // hosts
    return range(host * share, (host + 1) * share)


def _keys(batches: list[data.Batch]) -> list[bytes]:
    """The examples of the batches, pixels and label, in an order of their own."""
    pairs = [pair for batch in batches for pair in zip(batch["image"], batch["label"])]
    return sorted(image.tobytes() + label.tobytes() for image, label in pairs)


def test_shapes_and_types(make_config: MakeConfig) -> None:
    (batch,) = _take(data.train_batches(make_config(), 16, 12, 0, rows=_rows(12, 0, 3)), 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, 16, 16, 3), np.uint8),
        "label": ((4,), np.int32),
        "bad": ((4,), np.int32),
    }


@pytest.mark.slow
def test_augmented_batches_do_not_depend_on_the_number_of_hosts(make_config: MakeConfig) -> None:
    config = make_config(dataset="photos")  # 6 images: each batch repeats them
    one = _take(data.train_batches(config, 24, 8, seed=3), 4)
    assert len(set(_keys(one))) == 32  # no augmentation comes twice
    for hosts in (2, 4):
        parts = [
            _take(data.train_batches(config, 24, 8, 3, rows=_rows(8, host, hosts)), 4)
            for host in range(hosts)
        ]
        for whole, *shares in zip(one, *parts, strict=True):
            for name, array in whole.items():
                np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), array)


def test_any_rows_of_a_batch(make_config: MakeConfig) -> None:
    config = make_config()
    rows = [1, 2, 7, 11]
    whole = _take(data.train_batches(config, 8, 12, 0, 3), 2)
    for expected, actual in zip(whole, _take(data.train_batches(config, 8, 12, 0, 3, rows), 2), strict=True):
        np.testing.assert_array_equal(actual["image"], expected["image"][rows])
    whole = list(data.eval_batches(config, 8, 12))
    for expected, actual in zip(whole, data.eval_batches(config, 8, 12, rows), strict=True):
        np.testing.assert_array_equal(actual["image"], expected["image"][rows])


@pytest.mark.slow
def test_start_step_skips_batches(make_config: MakeConfig) -> None:
    for hosts in (1, 2):
        config = make_config()
        whole = _take(data.train_batches(config, 8, 64, 5, 0, _rows(64, hosts - 1, hosts)), 40)
        later = _take(data.train_batches(config, 8, 64, 5, 37, _rows(64, hosts - 1, hosts)), 3)
        for expected, actual in zip(whole[37:], later):
            np.testing.assert_array_equal(actual["image"], expected["image"])
            np.testing.assert_array_equal(actual["label"], expected["label"])


def test_threads_do_not_change_the_batches(make_config: MakeConfig) -> None:
    runs = [
        _take(data.train_batches(make_config(num_threads=threads, prefetch=prefetch), 8, 50, 1), 3)
        for threads, prefetch in [(1, 0), (1, 1), (0, 16), (7, 4)]
    ]
    for run in runs[1:]:
        for expected, actual in zip(runs[0], run):
            np.testing.assert_array_equal(actual["image"], expected["image"])


def test_starts_late_in_a_long_run_at_once(make_config: MakeConfig) -> None:
    start = time.perf_counter()
    late = _take(data.train_batches(make_config(), 8, 512, 0, start_step=10**6), 1)
    assert time.perf_counter() - start < 2
    assert _keys(late) != _keys(_take(data.train_batches(make_config(), 8, 512, 0), 1))


@pytest.mark.slow
def test_every_epoch_has_each_image_once_in_a_new_order(make_config: MakeConfig) -> None:
    config = make_config(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)
    epochs = _take(data.train_batches(config, 8, 1437, seed=0), 3)
    plain = [batch["image"].reshape(1437, -1).tolist() for batch in epochs]
    assert plain[0] != plain[1] != plain[2]
    assert sorted(plain[0]) == sorted(plain[1]) == sorted(plain[2])
    (other,) = _take(data.train_batches(config, 8, 1437, seed=1), 1)
    assert other["image"].reshape(1437, -1).tolist() not in plain


@pytest.mark.slow
def test_a_batch_may_exceed_the_dataset(make_config: MakeConfig) -> None:
    (batch,) = _take(data.train_batches(make_config(), 8, 2000, seed=0), 1)
    assert batch["image"].shape == (2000, 8, 8, 3)


def test_repeated_index_draws_as_deits_sampler() -> None:
    # RASampler's list: each index of the epoch's permutation three times, cut after an epoch's length.
    for num_examples in (6, 10, 11):
        epochs = [np.arange(num_examples) + epoch * num_examples for epoch in range(3)]
        expected = np.concatenate([np.repeat(epoch, 3)[:num_examples] for epoch in epochs])
        actual = [repeated_index(position, num_examples, 3) for position in range(3 * num_examples)]
        assert actual == expected.tolist()
    assert [repeated_index(position, 7, 1) for position in range(20)] == list(range(20))


def _plain(make_config: MakeConfig, repeats: int) -> ConfigDict:
    return make_config(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, repeats=repeats)


@pytest.mark.slow
def test_repeats_come_in_a_row_and_from_all_images(make_config: MakeConfig) -> None:
    batches = _take(data.train_batches(_plain(make_config, 3), 8, 479, seed=0), 6)
    pixels = [image.tobytes() for batch in batches for image in batch["image"]]
    # 1437 = 3 * 479 images: an epoch shows 479 of them three times each.
    first, second = pixels[:1437], pixels[1437:]
    assert all(len(set(first[i : i + 3])) == 1 for i in range(0, 1437, 3))
    assert len(set(first)) > 470  # some digits look the same
    both = len(set(first) & set(second))
    assert 100 < both < 230  # of 479: a third, for the next epoch draws from all images again
    # They are the first third of the order without repetition.
    plain = _take(data.train_batches(_plain(make_config, 1), 8, 479, seed=0), 1)[0]["image"]
    assert [image.tobytes() for image in plain] == first[::3]


def test_repeats_are_augmented_differently(make_config: MakeConfig) -> None:
    config = make_config(dataset="photos", repeats=3)
    (batch,) = _take(data.train_batches(config, 24, 6, seed=1), 1)
    assert batch["label"].tolist() == [batch["label"][0]] * 3 + [batch["label"][3]] * 3
    assert len({image.tobytes() for image in batch["image"]}) == 6


@pytest.mark.slow
def test_repeats_do_not_depend_on_hosts_and_start(make_config: MakeConfig) -> None:
    config = make_config(repeats=3, auto_augment="rand-m9-mstd0.5-inc1")
    one = _take(data.train_batches(config, 8, 120, seed=3), 14)
    for hosts in (2, 3):
        parts = [
            _take(data.train_batches(config, 8, 120, 3, 10, _rows(120, host, hosts)), 4)
            for host in range(hosts)
        ]
        for whole, *shares in zip(one[10:], *parts):
            images = np.concatenate([share["image"] for share in shares])
            np.testing.assert_array_equal(images, whole["image"])
    start = time.perf_counter()
    _take(data.train_batches(config, 8, 120, 3, start_step=10**7), 1)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("hosts", [1, 3, 8])
@pytest.mark.parametrize("per_host", [1, 17, 500])
def test_eval_counts_each_image_once(make_config: MakeConfig, hosts: int, per_host: int) -> None:
    config = make_config(eval_split="test[:100]")
    split = data.open_eval_split(config)
    expected = np.sort([split.source[index]["label"] for index in range(100)])
    size = per_host * hosts
    parts = [list(data.eval_batches(config, 16, size, _rows(size, host, hosts))) for host in range(hosts)]
    assert {len(part) for part in parts} == {-(-100 // (per_host * hosts))}
    batches = [batch for part in parts for batch in part]
    assert {batch["mask"].dtype for batch in batches} == {np.dtype(bool)}
    mask = np.concatenate([batch["mask"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    assert images.shape == (len(batches) * per_host, 16, 16, 3)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert mask.sum() == 100
    np.testing.assert_array_equal(np.sort(labels[mask]), expected)
    assert len(np.unique(images[mask], axis=0)) == 100
    assert not images[~mask].any()
    assert not labels[~mask].any()


def test_eval_images_are_torchvisions(make_config: MakeConfig, golden: dict[str, np.ndarray]) -> None:
    config = make_config(dataset="photos", eval_split="train", eval_resize=256)
    (batch,) = data.eval_batches(config, 224, 6)
    for index in (1, 4):
        np.testing.assert_array_equal(batch["image"][index], golden[f"{index}/eval"])
    np.testing.assert_array_equal(batch["label"], [0, 1, 0, 1, 0, 1])


def test_other_colour_spaces_become_rgb(make_config: MakeConfig) -> None:
    config = make_config(dataset="photos", eval_split="odd")
    (batch,) = data.eval_batches(config, 16, 1)
    assert batch["image"].shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("part", "index"), [("damaged[1:2]", 0), ("damaged", 1)])
def test_damaged_image(make_config: MakeConfig, part: str, index: int) -> None:
    config = make_config(dataset="photos", train_split=part, eval_split=part, eval_resize=32)
    with pytest.raises(UserError) as caught:
        list(data.eval_batches(config, 32, 3))
    assert f"cannot decode record {index} of split {part!r} of photos (1.jpeg): " in str(caught.value)
    with pytest.raises(UserError, match=r"cannot decode record \d of split 'damaged"):
        _take(data.train_batches(config, 32, 8, seed=0), 1)


def test_closing_ends_the_threads(make_config: MakeConfig) -> None:
    batches = data.train_batches(make_config(num_threads=3), 8, 8, seed=0)
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=5)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_scale": (0.5, 0.1)}, r"config\.data\.crop_scale is \(0\.5, 0\.1\); expected two"),
        ({"crop_scale": (0.1, 2.0)}, r"config\.data\.crop_scale .*at most 1"),
        ({"crop_ratio": (0.0, 1.0)}, r"config\.data\.crop_ratio"),
        ({"crop_ratio": (1.0, 1.0, 1.0)}, r"config\.data\.crop_ratio"),
        ({"crop_interpolation": "bilinar"}, r"crop_interpolation is 'bilinar'; expected one of bilinear"),
        ({"repeats": 0}, r"config\.data\.repeats is 0; expected a whole number of at least 1"),
        ({"num_threads": -1}, r"config\.data\.num_threads is -1; expected a whole number"),
        ({"prefetch": -1}, r"config\.data\.prefetch is -1"),
        ({"train_split": "trian"}, "no split 'trian' in digits"),
    ],
)
def test_wrong_settings_of_training(
    make_config: MakeConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):  # before the first batch is asked for
        data.train_batches(make_config(**changes), 8, 8, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_resize": -1}, r"config\.data\.eval_resize is -1"),
        ({"eval_interpolation": "lanczos"}, r"config\.data\.eval_interpolation is 'lanczos'"),
        ({"eval_split": "validation"}, "no split 'validation' in digits"),
    ],
)
def test_wrong_settings_of_evaluation(
    make_config: MakeConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        data.eval_batches(make_config(**changes), 8, 8)


def test_wrong_arguments(make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(UserError, match=r"config\.batch_size is 0; expected"):
        data.train_batches(config, 8, 0, 0)
    with pytest.raises(UserError, match=r"config\.eval_batch_size is 0; expected"):
        data.eval_batches(config, 8, 0)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=rf"config\.seed is {seed}; expected"):
            data.train_batches(config, 8, 8, seed)
    with pytest.raises(UserError, match="image_size is 0"):
        data.train_batches(config, 0, 8, 0)
    for rows in ([], [8], [1, 0], [0, 0], [-1]):
        with pytest.raises(ValueError, match=r"expected some of range\(8\)"):
            data.train_batches(config, 8, 8, 0, rows=rows)


def test_steps_per_epoch(make_config: MakeConfig) -> None:
    split = data.open_train_split(make_config())
    assert data.steps_per_epoch(split.num_examples, 64) == 22
    assert data.steps_per_epoch(split.num_examples, 2000) == 1


# --- images that cannot be decoded -------------------------------------------------------------


def test_the_next_image_takes_the_place_of_a_bad_one(make_config: MakeConfig) -> None:
    config = make_config(dataset="photos", train_split="damaged", max_bad_images=2)
    (batch,) = _take(data.train_batches(config, 24, 12, seed=0), 1)
    # Of the three records only the first is whole; each epoch draws each record once.
    assert sorted(batch["bad"].tolist()) == [-1] * 4 + [1] * 4 + [2] * 4
    assert batch["label"].tolist() == [0] * 12
    again = _take(data.train_batches(config, 24, 12, 0, rows=_rows(12, 1, 2)), 1)[0]
    np.testing.assert_array_equal(again["image"], batch["image"][6:])


def test_more_bad_images_than_allowed(make_config: MakeConfig) -> None:
    config = make_config(dataset="photos", train_split="damaged", max_bad_images=1)
    message = "2 images of split 'damaged' of photos .*, including record 1 .1.jpeg., record 2 .2.jpeg.,"
    with pytest.raises(UserError, match=message):
        _take(data.train_batches(config, 24, 12, seed=0), 1)


def test_no_image_can_be_decoded(make_config: MakeConfig) -> None:
    config = make_config(dataset="photos", train_split="damaged[1:]", max_bad_images=9)
    with pytest.raises(UserError, match=r"no image of split 'damaged\[1:\]' of photos can be decoded"):
        _take(data.train_batches(config, 24, 4, seed=0), 1)


def test_only_decoding_makes_a_bad_image(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(dataset="photos", train_split="train", eval_split="train", max_bad_images=9)
    source = type(data.open_split("photos", config.data_dir, "train").source)

    def fails(*_: Any) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(source, "__getitem__", fails)
    for batches in (data.train_batches(config, 24, 4, seed=0), data.eval_batches(config, 24, 4)):
        with pytest.raises(UserError, match=r"cannot read record \d .*Input/output error; check the disk"):
            next(batches)


def test_a_shard_that_is_cut_off_meanwhile(make_config: MakeConfig, tmp_path: Path) -> None:
    directory = shutil.copytree(make_config().data_dir, tmp_path / "data")
    config = make_config(data_dir=str(directory), max_bad_images=9_999)
    batches = data.train_batches(config, 8, 64, seed=0)
    next(batches)
    (shard,) = Path(directory).rglob("digits-train.array_record*")
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match=r"cannot read record \d+ of split 'train' of digits: its file was"):
        _take(batches, 99)


def test_bad_images_are_masked_in_evaluation(make_config: MakeConfig) -> None:
    config = make_config(dataset="photos", eval_split="damaged", max_bad_images=2)
    (batch,) = list(data.eval_batches(config, 24, 4))
    assert batch["mask"].tolist() == [True, False, False, False]
    assert batch["bad"].tolist() == [-1, 1, 2, -1]
    config.max_bad_images = 1
    with pytest.raises(UserError, match="2 images of split 'damaged'"):
        list(data.eval_batches(config, 24, 4))


# --- processes ---------------------------------------------------------------------------------

SCRIPT = """
import hashlib, itertools, json, sys
from bvit_jax import data
from bvit_jax.config import default_config

def main():
    settings = json.loads(sys.argv[1])
    config = default_config().data
    config.update(settings["data"])
    host, hosts = settings["host"]
    rows = range(32)[host * 32 // hosts : (host + 1) * 32 // hosts]
    if settings["train"]:
        batches = data.train_batches(config, 8, 32, 7, 400_000, rows)
    else:
        batches = data.eval_batches(config, 8, 32, rows)
    for batch in itertools.islice(batches, settings["count"]):
        for image, label, kept in zip(batch["image"], batch["label"], batch.get("mask", [True] * 32)):
            print(hashlib.sha256(image.tobytes()).hexdigest(), label, int(kept))
    batches.close()

if __name__ == "__main__":
    main()
"""


def _in_processes(script: Path, config: ConfigDict, hosts: int, **settings: Any) -> list[list[str]]:
    """Runs a real process for each host at once and returns what each of them prints of its images."""
    data_settings = {
        key: config[key] for key in ("dataset", "data_dir", "eval_split", "eval_resize", "num_workers")
    }
    script.write_text(SCRIPT)
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(script),
                json.dumps({"data": data_settings, "host": (host, hosts), **settings}),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])},
        )
        for host in range(hosts)
    ]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * hosts
    return outputs


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_evaluation_sees_each_image_once(make_config: MakeConfig, hosts: int, tmp_path: Path) -> None:
    config = make_config(eval_split="train", eval_resize=8)  # 1437 images, no multiple of anything
    if hosts == 2:
        lines = _in_processes(tmp_path / "host.py", config, 2, train=False, count=None)
        kept = [line.split()[0] for part in lines for line in part if line.endswith(" 1")]
        assert len(lines[0]) == len(lines[1])
    else:
        parts = [list(data.eval_batches(config, 8, 32, _rows(32, host, hosts))) for host in range(hosts)]
        assert len({len(part) for part in parts}) == 1
        kept = [
            hashlib.sha256(image.tobytes()).hexdigest()
            for part in parts
            for batch in part
            for image, keep in zip(batch["image"], batch["mask"])
            if keep
        ]
    source = data.open_split("digits", config.data_dir, "train").source
    pixels = [np.asarray(images.decode(source[i]["image"])) for i in range(1437)]
    assert sorted(kept) == sorted(hashlib.sha256(image.tobytes()).hexdigest() for image in pixels)


@pytest.mark.slow
def test_worker_processes_do_not_change_the_batches(make_config: MakeConfig, tmp_path: Path) -> None:
    script = tmp_path / "host.py"
    threads, processes = (
        _in_processes(script, make_config(num_workers=workers), 1, train=True, count=5) for workers in (0, 2)
    )
    assert threads == processes
    assert len(threads[0]) == 5 * 32


KILLED = """
import json, multiprocessing, os, sys
from bvit_jax import data
from bvit_jax.config import default_config
from bvit_jax.errors import UserError

def main():
    config = default_config().data
    config.update(json.loads(sys.argv[1]))
    batches = data.train_batches(config, 8, 32, 7)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, 9)
    try:
        for _ in batches:
            pass
    except UserError as error:
        print(error)
    batches = data.train_batches(config, 8, 32, 7)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), 9)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_processes_that_are_killed(make_config: MakeConfig, tmp_path: Path) -> None:
    script, config = tmp_path / "killed.py", make_config(num_workers=2)
    script.write_text(KILLED)
    settings = {key: config[key] for key in ("dataset", "data_dir", "num_workers")}
    process = subprocess.run(
        [sys.executable, str(script), json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])},
        check=False,
    )
    error, pids = process.stdout.splitlines()
    assert error.startswith("a process that loads images has ended with exit code -9, as when memory")
    deadline = time.monotonic() + 30
    while any(map(_runs, pids.split())):  # nobody needs them
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_are_chosen_where_there_are_many_cores(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores, expected in ((1, (0, 1)), (8, (0, 8)), (31, (0, 16)), (32, (2, 16)), (112, (7, 16))):
        monkeypatch.setattr(pipeline, "usable_cores", lambda cores=cores: cores)
        assert pipeline._parallelism(make_config(num_threads=0)) == expected
    assert pipeline._parallelism(make_config(num_workers=3, num_threads=5)) == (3, 5)
