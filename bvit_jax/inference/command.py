"""Classifies image files: ``bvit predict --checkpoint PATH IMAGE...``

PATH is the workdir of a training run, or anything that ``bvit convert`` reads. Images are prepared as the
checkpoint says.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bvit_jax.errors import UserError, printable
from bvit_jax.files import any_path, local_path
from bvit_jax.inference.classifier import Classifier, Guess, load
from bvit_jax.runtime.arguments import add_noema, positive
from bvit_jax.weights.packed import Packed


def run(argv: list[str]) -> None:
    """Runs the command."""
    arguments = _parser().parse_args(argv)
    paths = arguments.images
    missing = [path for path in paths if not path.is_file()]
    if missing:  # before the model is loaded
        raise UserError(f"no file {missing[0]}; expected an image")
    classifier = load(arguments.checkpoint, checkpoint=arguments.kind, ema=arguments.ema)
    for text in classifier.pretrained.assumed:
        print(f"assumed, since the checkpoint does not say: {text}", file=sys.stderr)
    for path, ranking in zip(paths, _rankings(classifier, paths, arguments.top), strict=True):
        if arguments.json:
            print(json.dumps({"image": str(path), "classes": [asdict(guess) for guess in ranking]}))
            continue
        print(printable(str(path)))
        for guess in ranking:
            print(f"  {100 * guess.probability:5.1f} %  {printable(guess.name)}")


def _rankings(classifier: Classifier, paths: Sequence[Path], count: int) -> Iterator[list[Guess]]:
    """Yields the likeliest classes of each image; the first ones, which compile the model, under a bar."""
    rankings = classifier.top(paths, count)
    if paths and not isinstance(classifier.pretrained, Packed):
        from bvit_jax.data.progress import ProgressBar  # here, as packed models do without rich

        with ProgressBar("compiling the model", 1) as bar:
            first = next(rankings)
            bar.advance()
        yield first
    yield from rankings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bvit predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=local_path, nargs="+", metavar="IMAGE")
    parser.add_argument("--checkpoint", type=any_path, required=True, metavar="PATH")
    parser.add_argument("--kind", choices=("latest", "best"), help="of a workdir (default: latest)")
    add_noema(parser)
    parser.add_argument("--top", type=positive, default=5, help="classes to print per image")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser
