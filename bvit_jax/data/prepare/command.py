"""Prepares data sets for training: ``bvit prepare KIND ... --data_dir DIR``

Writes a TFDS data set in ArrayRecord format, without TensorFlow. It appears when it is complete; after an
interruption, run the same command again to continue.
"""

import argparse
from pathlib import Path

import tensorflow_datasets as tfds

from bvit_jax.data.prepare import cifar, imagenet, inaturalist, tfrecord
from bvit_jax.data.prepare.cifar import cifar100_source
from bvit_jax.data.prepare.icons import count_classes, icons_source, read_sets
from bvit_jax.data.prepare.imagefolder import imagefolder_source
from bvit_jax.data.prepare.imagenet import imagenet_source
from bvit_jax.data.prepare.inaturalist import inaturalist_source
from bvit_jax.data.prepare.shuffle import prepare
from bvit_jax.errors import UserError, nearest
from bvit_jax.files import local_path


def prepare_dataset(arguments: argparse.Namespace) -> Path:
    """Prepares the requested data set and returns its directory.

    Raises:
      UserError: the source is incomplete or damaged, or the data set cannot be written.
    """
    data_dir = arguments.data_dir
    if arguments.kind == "tfrecord":
        return tfrecord.convert(arguments.directory, data_dir)
    if arguments.kind == "imagefolder":
        return prepare(imagefolder_source(arguments.name, arguments.folder, data_dir))
    if arguments.kind == "inaturalist":
        return prepare(inaturalist_source(arguments.folder, arguments.year, data_dir, arguments.category))
    if arguments.kind == "icons":
        sets = read_sets(arguments.package)
        path = prepare(icons_source(sets, data_dir))
        for label, found in count_classes(sets).items():
            print(f"{label:20} {found['train']:4} train {found['test']:4} test")
        return path
    if arguments.kind == "cifar100":
        counts = expected_counts(arguments.expect, cifar.COUNTS)
        return prepare(cifar100_source(arguments.tar, data_dir, counts))
    counts = expected_counts(arguments.expect, imagenet.COUNTS)
    if arguments.from_tfrecord:
        counts = counts or imagenet.COUNTS
        return tfrecord.convert(arguments.from_tfrecord, data_dir, imagenet.NAME, counts)
    return prepare(imagenet_source(arguments.tars, data_dir, counts, arguments.verify_md5))


def expected_counts(text: str | None, official: dict[str, int]) -> dict[str, int] | None:
    """Returns the counts in a text such as ``train=2000,validation=500``, None for None.

    Raises:
      UserError: a split is unknown or missing, or a count is not a number above 0.
    """
    if text is None:
        return None
    counts = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in official:
            raise UserError(f"--expect names the split {name!r}{nearest(name, official)}")
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"--expect has {item!r}; expected {name}= and a number above 0")
        counts[name] = int(value)
    missing = sorted(set(official) - set(counts))
    if missing:
        raise UserError(f"--expect has no {missing[0]}; expected all of {', '.join(official)}")
    return {name: counts[name] for name in official}


def _report(path: Path) -> None:
    info = tfds.builder_from_directory(path).info
    counts = ", ".join(
        f"{name} {split.num_examples:,} in {split.num_shards:,} shards" for name, split in info.splits.items()
    )
    print(f"{path}: {counts}; {info.dataset_size / 1e9:.2f} GB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bvit prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    kind = kinds.add_parser("imagenet2012", help="ILSVRC 2012 from its two tars, or from TFRecord files")
    source = kind.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tars", type=local_path, metavar="DIR", help=f"holds {imagenet.TRAIN_TAR} and {imagenet.VAL_TAR}"
    )
    source.add_argument("--from_tfrecord", type=local_path, metavar="DIR", help="a copy that TFDS prepared")
    kind.add_argument(
        "--expect", metavar="train=N,validation=N", help="counts, if the tars are not the official ones"
    )
    kind.add_argument("--verify_md5", action="store_true", help="first check the MD5 sums of the tars")

    kind = kinds.add_parser("imagefolder", help="directories <split>/<class> of image files")
    kind.add_argument("name", metavar="NAME", help="name of the data set")
    kind.add_argument("--folder", type=local_path, required=True, metavar="DIR", help="holds the splits")

    kind = kinds.add_parser("cifar100", help=f"CIFAR-100 from {cifar.ARCHIVE}")
    kind.add_argument("--tar", type=local_path, required=True, metavar="FILE", help="the archive")
    kind.add_argument(
        "--expect", metavar="train=N,test=N", help="counts, if the archive is not the official one"
    )

    kind = kinds.add_parser("inaturalist", help="iNaturalist 2018 or 2019")
    kind.add_argument("--year", type=int, required=True, choices=inaturalist.YEARS)
    kind.add_argument(
        "--folder", type=local_path, required=True, metavar="DIR", help="the directory of the annotations"
    )
    kind.add_argument("--category", default="name", help=f"label rank: {', '.join(inaturalist.RANKS)}")

    kind = kinds.add_parser("icons", help="pictures of 237 things from the icon sets of an npm package")
    package = "the archive, which this gets: npm pack @iconify/json@2.2.535"
    kind.add_argument("--package", type=local_path, required=True, metavar="FILE", help=package)

    kind = kinds.add_parser("tfrecord", help="any data set that TFDS prepared as TFRecord files")
    kind.add_argument("directory", type=local_path, metavar="DIR", help="holds dataset_info.json")

    for kind in kinds.choices.values():
        kind.add_argument("--data_dir", type=local_path, required=True, metavar="DIR", help="TFDS directory")
    return parser


def run(argv: list[str]) -> None:
    """Runs the command."""
    _report(prepare_dataset(_parser().parse_args(argv)))
