"""Batches of uint8 images for training and evaluation, identical for any number of hosts.

Batch k holds the examples from ``k * batch_size`` of one global sequence; each host loads the rows that
its devices hold. A batch thus depends only on the seed and its number: a run resumes from its step alone,
even on a different number of hosts.
"""

import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax.data import images as image_files
from bvit_jax.data import randaugment, transforms
from bvit_jax.data.cores import usable_cores
from bvit_jax.data.splits import Split, one_line, open_split
from bvit_jax.errors import UserError, printable

MAX_THREADS = 16  # more only fight for the interpreter lock
NOT_BAD = np.int32(-1)
WORKER_ENDED = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")

Batch = dict[str, np.ndarray]

logger = logging.getLogger(__name__)


class _BadImage(UserError):
    """A record whose image cannot be decoded, though it could be read."""


def open_train_split(config: ConfigDict) -> Split:
    """Opens the training split that ``config`` (the ``data`` settings) names."""
    return open_split(config.dataset, config.data_dir, config.train_split)


def open_eval_split(config: ConfigDict) -> Split:
    """Opens the evaluation split that ``config`` (the ``data`` settings) names."""
    return open_split(config.dataset, config.data_dir, config.eval_split)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns how many full global batches the examples make, at least 1."""
    return max(1, num_examples // batch_size)


def train_augment(config: ConfigDict) -> transforms.Augment | None:
    """Returns what follows crop and flip: RandAugment, color jitter, or None for neither.

    Args:
      config: the ``data`` settings of the run.

    Raises:
      UserError: a setting is wrong, or both are on.
    """
    config_lib.check_section("data", config)
    strengths = transforms.ColorJitter(*config.color_jitter)
    jitters = strengths != transforms.ColorJitter()
    if not config.auto_augment:
        return partial(transforms.color_jitter, strengths=strengths) if jitters else None
    if jitters:
        raise UserError(
            f"config.data.color_jitter is {config.color_jitter} and config.data.auto_augment is"
            f" {config.auto_augment!r}, with which timm skips the jitter; switch one of them off"
        )
    interpolation = config.crop_interpolation
    names = sorted(transforms.INTERPOLATIONS) if interpolation == transforms.RANDOM else [interpolation]
    return partial(
        randaugment.rand_augment,
        policy=randaugment.parse_policy(config.auto_augment),
        resamples=tuple(transforms.INTERPOLATIONS[name] for name in names),
        fill=tuple(min(255, round(255 * mean)) for mean in config.mean),
    )


def train_batches(
    config: ConfigDict,
    image_size: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Generator[Batch, None, None]:
    """Yields this host's part of the training batches ``start_step``, ``start_step + 1``, ...

    The examples are shuffled again every epoch and augmented differently each time. Epochs follow each
    other without a gap, also within a batch. With ``config.repeats`` above 1 the order is that of
    `repeated_index`.

    Args:
      config: the ``data`` settings of the run.
      image_size: side of the square images, in pixels.
      batch_size: over all hosts.
      seed: for the order and the augmentation, from 0 to 2**32 - 1.
      start_step: number of the first batch; a large one costs nothing.
      rows: which images of each batch this host loads, in ascending order; by default all.

    Yields:
      ``image``, uint8 [b, image_size, image_size, 3], ``label``, int32 [b], and ``bad``, int32 [b],
      where b is the number of rows; endlessly, so call ``close()`` to stop the threads.
      An image that cannot be decoded is replaced by the next one of the split; ``bad`` is then the
      number of its record, and otherwise -1.

    Raises:
      UserError: a setting is wrong, the split cannot be opened (both at once, not when the first
        batch is drawn), or more different images than ``config.max_bad_images`` cannot be decoded.
    """
    augment_crop = train_augment(config)
    config_lib.check("seed", seed)
    rows = _rows("batch_size", batch_size, rows)
    transform = partial(
        transforms.train_transform,
        size=_checked_size(image_size),
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        interpolation=config.crop_interpolation,
        flip=config.flip,
        augment=augment_crop,
    )
    split = open_train_split(config)

    def augment(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**example, "image": transform(example["image"], rng)}

    source = _DecodedSplit(split, substitute=config.max_bad_images > 0)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if config.repeats > 1:
        dataset = _repeated(dataset, split.num_examples, config.repeats).seed(seed)
    # Augment before choosing rows: the generator is seeded by the index, which must be the global one.
    dataset = _of_rows(dataset.random_map(augment), sys.maxsize, batch_size, rows)
    return _batches(dataset[start_step * len(rows) :], len(rows), config, split)


def eval_batches(
    config: ConfigDict, image_size: int, batch_size: int, rows: Sequence[int] | None = None
) -> Generator[Batch, None, None]:
    """Yields this host's part of one pass over the evaluation split, in the order of the records.

    Every host yields the same number of batches, ``ceil(num_examples / batch_size)``; over all
    hosts each image appears exactly once. The arguments are those of `train_batches`.

    Yields:
      ``image``, uint8 [b, image_size, image_size, 3], ``label``, int32 [b], ``mask``, bool [b], and
      ``bad``, int32 [b] as in `train_batches`, where b is the number of rows. Black images with label 0
      and mask False fill the last batch and replace images that cannot be decoded.

    Raises:
      UserError: as for `train_batches`.
    """
    config_lib.check_section("data", config)
    rows = _rows("eval_batch_size", batch_size, rows)
    transform = partial(
        transforms.eval_transform,
        size=_checked_size(image_size),
        resize=config_lib.eval_resize(config, image_size),
        interpolation=config.eval_interpolation,
    )
    split = open_eval_split(config)
    images = _DecodedSplit(split, substitute=False)
    padding = {
        "image": np.zeros((image_size, image_size, 3), np.uint8),
        "label": np.int32(0),
        "mask": np.False_,
        "bad": NOT_BAD,
    }

    def load(index: int) -> dict[str, Any]:
        if index >= split.num_examples:
            return padding
        try:
            example = images[index]
        except _BadImage:
            if config.max_bad_images == 0:
                raise
            return {**padding, "bad": np.int32(index)}
        return {**example, "image": transform(example["image"]), "mask": np.True_}

    num_batches = -(-split.num_examples // batch_size)
    dataset = grain.MapDataset.range(num_batches * batch_size).map(load)
    return _batches(_of_rows(dataset, num_batches, batch_size, rows), len(rows), config, split)


def repeated_index(position: int, num_examples: int, repeats: int) -> int:
    """Maps a position of the sequence with repeated augmentation to one without repetition.

    Repeated augmentation (Hoffer et al., 2020; DeiT's ``samplers.py``) draws each image ``repeats``
    times in a row, to be augmented differently. An epoch still has ``num_examples`` positions, so
    it sees one in ``repeats`` of the images; the next epoch draws from all images again.

    Args:
      position: in the endless sequence of training examples, over all hosts.
      num_examples: of the split, the length of an epoch.
      repeats: copies of each image.

    Returns:
      A position in the endless sequence that holds each epoch's images once, in shuffled order.
    """
    epoch, place = divmod(position, num_examples)
    return epoch * num_examples + place // repeats


def _repeated(shuffled: grain.MapDataset, num_examples: int, repeats: int) -> grain.MapDataset:
    def example(position: int) -> dict[str, Any]:
        return shuffled[repeated_index(position, num_examples, repeats)]

    return grain.MapDataset.range(sys.maxsize).map(example)


class _DecodedSplit:
    """A split whose images are decoded by the thread that reads them.

    With ``substitute``, an image that cannot be decoded is replaced by the next one of the split.
    """

    def __init__(self, split: Split, *, substitute: bool) -> None:
        self._split, self._substitute = split, substitute

    def __len__(self) -> int:
        return self._split.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        bad = NOT_BAD
        for tried in range(len(self)):
            try:
                return {**self._decoded((index + tried) % len(self)), "bad": bad}
            except _BadImage:
                if not self._substitute:
                    raise
                bad = np.int32(index)
        raise UserError(f"no image of split {self._split.name!r} of {self._split.dataset} can be decoded")

    def _decoded(self, index: int) -> dict[str, Any]:
        split = self._split
        place = f"record {index} of split {split.name!r} of {split.dataset}"
        try:
            record = split.source[index]
            if record["image"] is None:  # what ArrayRecord reads beyond the end
                raise OSError("its file was truncated")
        except Exception as error:  # of the disk, the network, TFDS or ArrayRecord: not of the image
            raise UserError(
                f"cannot read {place}: {one_line(error)}; check the disk, or prepare the dataset again"
            ) from error
        try:
            image = image_files.decode(record["image"])
        except image_files.ImageError as error:
            raise _BadImage(
                f"cannot decode {place}{_file_name(record)}: {error}; prepare the dataset again, or allow a"
                " few such images with config.data.max_bad_images"
            ) from error
        return {"image": image, "label": np.int32(record["label"])}


def _file_name(record: dict[str, Any]) -> str:
    """Returns the name of a record's file, where the data set has it, in brackets."""
    name = record.get("file_name", record.get("filename"))
    text = name.decode(errors="replace") if isinstance(name, bytes) else name
    return "" if text is None else f" ({printable(str(text))})"


def _batches(dataset: Any, local_size: int, config: ConfigDict, split: Split) -> Generator[Batch, None, None]:
    workers, threads = _parallelism(config)
    if not workers:
        # Threads work on images, not on batches: the first batch comes soon and few images wait.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * config.prefetch)
        dataset = dataset.to_iter_dataset(options).batch(local_size, drop_remainder=True)
        return _within_budget(_until_closed(dataset), split, config.max_bad_images)
    # Each process takes every n-th element, so the elements must be whole batches.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    dataset = dataset.batch(local_size, drop_remainder=True).to_iter_dataset(options)
    _let_grain_read_its_flags()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _end_with_parent)
    return _within_budget(_until_closed(dataset), split, config.max_bad_images)


def _let_grain_read_its_flags() -> None:
    """Marks the flags that Grain itself defines as given, with their defaults.

    It reads one of them when it starts processes, which absl refuses in a program that has not parsed its
    flags. Flags of others stay as they are.
    """
    for name in flags.FLAGS:
        if name.startswith("grain_"):
            flags.FLAGS[name].present = True


def _end_with_parent(index: int, count: int) -> None:
    """Makes a process that loads images end when the one that it loads them for is killed."""
    del index, count

    def wait() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os.kill(os.getpid(), signal.SIGKILL)  # nobody is there whom its queues could reach

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _parallelism(config: ConfigDict) -> tuple[int, int]:
    """Returns the number of worker processes, 0 for none, and of threads in each."""
    cores, workers = usable_cores(), config.num_workers
    if workers < 0:
        workers = cores // MAX_THREADS if cores >= 2 * MAX_THREADS else 0
    return workers, config.num_threads or max(1, min(MAX_THREADS, cores // max(workers, 1)))


def _within_budget(
    batches: Generator[Batch, None, None], split: Split, budget: int
) -> Generator[Batch, None, None]:
    bad: dict[int, str] = {}
    try:
        for batch in batches:
            for index in sorted(set(batch["bad"].tolist()) - {int(NOT_BAD), *bad}):
                bad[index] = f"record {index}{_file_name(split.source[index])}"
                logger.warning(
                    "%s of split %r of %s cannot be decoded", bad[index], split.name, split.dataset
                )
            if len(bad) > budget:
                raise UserError(
                    f"{len(bad)} images of split {split.name!r} of {split.dataset} cannot be decoded,"
                    f" including {', '.join(bad[i] for i in sorted(bad)[:5])}, and"
                    f" config.data.max_bad_images is {budget}; prepare the dataset again"
                )
            yield batch
    finally:
        batches.close()


def _until_closed(dataset: Any) -> Generator[Batch, None, None]:
    iterator = iter(dataset)
    try:
        yield from iterator
    except RuntimeError as error:
        if (code := WORKER_ENDED.search(str(error))) is None:
            raise
        raise UserError(
            f"a process that loads images has ended with exit code {code[1]}, as when memory or /dev/shm is"
            " short; lower config.data.num_workers, num_threads or prefetch, and run the same command again"
        ) from error
    finally:
        iterator.close()  # otherwise its threads finish the waiting images first


def _rows(key: str, batch_size: int, rows: Sequence[int] | None) -> list[int]:
    config_lib.check(key, batch_size)
    rows = list(range(batch_size)) if rows is None else [int(row) for row in rows]
    if not rows or sorted(set(rows)) != rows or not 0 <= rows[0] <= rows[-1] < batch_size:
        raise ValueError(f"rows {rows}; expected some of range({batch_size}), in ascending order")
    return rows


def _of_rows(dataset: Any, num_batches: int, batch_size: int, rows: list[int]) -> Any:
    """Returns the examples in some rows of each batch."""
    if len(rows) == batch_size:
        return dataset

    def example(position: int) -> dict[str, Any]:
        batch, place = divmod(position, len(rows))
        return dataset[batch * batch_size + rows[place]]

    return grain.MapDataset.range(min(num_batches * len(rows), sys.maxsize)).map(example)


def _checked_size(image_size: int) -> int:
    if image_size < 1:
        raise UserError(f"config.model.image_size is {image_size}; expected at least 1")
    return image_size
