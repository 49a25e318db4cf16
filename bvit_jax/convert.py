"""Moves weights between PyTorch and JAX: ``bvit convert SOURCE TARGET``

SOURCE is a checkpoint of the BinaryViT code (.pth), DeiT or Swin of Facebook, Microsoft or timm (.pth or
.safetensors), a directory of Hugging Face's ViT, DeiT or Swin, a directory or file that this command
wrote, or the workdir of a training run. TARGET is a directory, or a file that ends in .safetensors or
.pth; it must not exist, and appears whole or not at all.
"""

if __name__ == "__main__":  # before all that takes seconds to import: signals are heard from here on
    from bvit_jax import cli

    cli.run("convert")

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from bvit_jax import models, weights
from bvit_jax.data.progress import ProgressBar
from bvit_jax.errors import UserError
from bvit_jax.files import any_path, local_path
from bvit_jax.runtime import process
from bvit_jax.runtime.arguments import add_noema, add_set, positive
from bvit_jax.weights import resize
from bvit_jax.weights.class_names import default_class_names, readable_class_names
from bvit_jax.weights.formats import FORMATS
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.saving import NATIVE
from bvit_jax.weights.state_dicts import StateDictError
from bvit_jax.workdir import runs


def convert(arguments: argparse.Namespace) -> Pretrained:
    """Runs the conversion that the command line asks for, and returns what was written.

    Raises:
      UserError: the source cannot be read or does not fit, or the target exists or cannot hold it.
    """
    if os.path.lexists(arguments.target):  # before the work
        raise UserError(f"{arguments.target} exists; delete it or choose another target")
    with ProgressBar("converting", 2) as bar:
        model = _changed(arguments)
        bar.advance()
        weights.save(model, arguments.target, arguments.format)
        bar.advance()
    return model


def _changed(arguments: argparse.Namespace) -> Pretrained:
    """Returns the source with the image size, head and names that are asked for."""
    model = runs.load_model(
        arguments.source,
        kind=arguments.checkpoint,
        ema=arguments.ema,
        config_file=arguments.config,
        overrides=dict(arguments.set),
        weights_key=arguments.key,
        ignored=arguments.ignore,
        new_classes=arguments.reset_head,
    )
    if arguments.image_size:
        model = resize.resized(model, arguments.image_size)
    names = class_names(arguments.class_names, arguments.reset_head or model.config.num_classes)
    if arguments.reset_head:
        model = resize.with_new_head(model, names or default_class_names(arguments.reset_head))
    elif names:
        model = dataclasses.replace(model, class_names=names)
    return model


def class_names(path: Path | None, num_classes: int) -> tuple[str, ...]:
    """Returns the lines of a file, none without a file; raises `UserError` for another number of them."""
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; expected a name on each line") from error
    if len(lines) != num_classes:
        raise UserError(f"{path} has {len(lines)} lines; expected the names of {num_classes} classes")
    return readable_class_names(lines)


def _report(model: Pretrained, target: Path, file_format: str) -> None:
    config = model.config
    count = models.num_params(model.variables["params"])
    print(
        f"{target}: {config.name}, {count:,} parameters, {config.num_classes} classes,"
        f" {config.image_size} pixels, format {file_format}"
    )
    if model.assumed:
        print(f"  assumed, since the file does not say: {'; '.join(model.assumed)} (--set KEY=VALUE)")
    if model.left_out:
        print(f"  left out: {', '.join(model.left_out)}")
    if unused := model.unused():
        print(f"  kept, though the model never reads them: {len(unused)} arrays such as {unused[0]}")
    if model.bookkeeping and file_format not in (NATIVE, model.bookkeeping_format):
        kinds = sorted({name.rpartition(".")[2] for name in model.bookkeeping})
        print(f"  left out, no place in this format: {len(model.bookkeeping)} arrays {', '.join(kinds)}")
    if damaged := model.not_finite():
        print(f"  {len(damaged)} arrays hold numbers that are not finite, the first is {damaged[0]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bvit convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=any_path, metavar="SOURCE")
    parser.add_argument("target", type=local_path, metavar="TARGET")
    parser.add_argument(
        "--format", default=NATIVE, metavar="FORMAT", help=f"one of {', '.join([NATIVE, *FORMATS])}"
    )
    parser.add_argument("--config", type=local_path, metavar="FILE", help="config.json for SOURCE")
    add_set(parser, "a setting of the model")
    parser.add_argument("--key", help="entry of a .pth with the weights, such as model_ema")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="arrays to leave out: 'vit.pooler.*'"
    )
    parser.add_argument("--checkpoint", choices=("latest", "best"), help="of a workdir (default: latest)")
    add_noema(parser)
    parser.add_argument("--image_size", type=positive, help="interpolates the position embeddings")
    parser.add_argument("--reset_head", type=positive, metavar="CLASSES", help="a new head, initialised")
    parser.add_argument("--class_names", type=local_path, metavar="FILE", help="a name on each line")
    parser.add_argument("--verbose", action="store_true", help="list every array that does not fit")
    return parser


def run(argv: list[str]) -> None:
    """Runs the command."""
    arguments = _parser().parse_args(argv)
    try:
        with process.on_cpu():  # there is nothing to compute
            model = convert(arguments)
    except StateDictError as error:
        for problem in error.problems if arguments.verbose else []:
            print(problem, file=sys.stderr)
        raise
    _report(model, arguments.target, arguments.format)
