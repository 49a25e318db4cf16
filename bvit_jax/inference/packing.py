"""Folds a model into a packed file or a program: ``bvit export SOURCE TARGET``

SOURCE is whatever ``bvit predict`` takes, with weights and activations of one bit. TARGET is a directory,
which must not exist and appears whole or not at all. ``bvit predict`` and ``bvit eval`` read it, and so does
`bvit_jax.load`, with JAX, NumPy, safetensors and Pillow alone. It cannot be converted back: latent weights
are gone. --format stablehlo writes a program instead, which JAX runs without this package. With --half
--config=NAME, --split and --config.KEY=VALUE name the data on which it is compared.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.cost import cost_of
from bvit_jax.data.progress import ProgressBar
from bvit_jax.errors import UserError
from bvit_jax.files import any_path, local_path
from bvit_jax.inference.classifier import Classifier
from bvit_jax.inference.engine import fold
from bvit_jax.inference.stablehlo import write_program
from bvit_jax.runtime import process
from bvit_jax.runtime.arguments import add_noema, parse_config
from bvit_jax.weights import Pretrained
from bvit_jax.weights.packed import Packed, Settings, write_packed
from bvit_jax.workdir import runs

FORMATS = ("packed", "stablehlo")
KINDS = ("signs", "per channel", "positions", "classifier", "other")


def pack(model: Pretrained | Classifier) -> Packed:
    """Returns a model folded and packed, as `export` writes it.

    Raises:
      UserError: its weights or activations have more than one bit.
    """
    read = model.pretrained if isinstance(model, Classifier) else model
    if isinstance(read, Packed):
        raise UserError("the model is packed already")
    return Packed(
        config=Settings(read.config.to_dict()),
        folded=fold(read.config, read.variables),
        preprocessing=read.preprocessing,
        class_names=tuple(read.class_names),
        history=read.history,
        source=read.digest(),
    )


def halved(model: Packed) -> Packed:
    """Returns a packed model whose numbers per channel and positions are float16.

    The classifier, the kernels of real layers and single numbers stay float32.

    Raises:
      UserError: a number is out of the range of float16.
    """
    folded = dict(model.folded)
    for name, array in folded.items():
        if array.ndim and _kind(name, array) in ("per channel", "positions"):
            if np.abs(array).max(initial=0) > np.finfo(np.float16).max:
                raise UserError(
                    f"{name} holds {np.abs(array).max():g}, too large for float16; leave out --half"
                )
            folded[name] = array.astype(np.float16)
    return dataclasses.replace(model, folded=folded)


def export(model: Pretrained | Classifier, path: Path | str, *, half: bool = False) -> None:
    """Writes a model as a packed directory, which the engine runs.

    Args:
      model: what `bvit_jax.load` returned.
      path: must not exist; appears complete or not at all.
      half: whether numbers per channel and positions are stored in float16.

    Raises:
      UserError: the path exists or cannot be written, or the model has more than one bit.
    """
    packed = halved(pack(model)) if half else pack(model)
    write_packed(packed, Path(path).expanduser(), version("bvit_jax"))


def sizes(folded: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the bytes of folded arrays by what they hold, see `KINDS`."""
    found = dict.fromkeys(KINDS, 0)
    for name, array in folded.items():
        found[_kind(name, array)] += array.nbytes
    return found


def _kind(name: str, array: np.ndarray) -> str:
    """Returns what an array holds, one of `KINDS`."""
    if array.dtype == np.uint32:
        return "signs"
    if name.startswith(("head/", "distillation_head/")):
        return "classifier"
    if name.endswith("/positions"):
        return "positions"
    matrix = name.rpartition("/")[2] in ("patches", "kernel")
    return "other" if matrix else "per channel"


def _report(model: Packed, pretrained: Pretrained, arguments: argparse.Namespace) -> str:
    """Returns what was written, of a packed file by kind, and what ``bvit report cost`` counts."""
    target: Path = arguments.target
    total = sum(file.stat().st_size for file in target.iterdir())
    found = {}
    if arguments.format == "packed":  # in a program, JAX stores equal arrays once: kinds would not add up
        found = sizes(model.folded)
        found["header"] = total - sum(found.values())
    module = models.create_model(pretrained.config)
    counted = cost_of(module, pretrained.config.image_size, training=False).total.packed_bytes
    size = f"{total / 1e6:.3f} MB; bvit report cost counts {counted / 1e6:.3f} MB before folding"
    lines = [f"{target}: {model.config.name}, {size}"]
    return "\n".join([*lines, *(f"  {kind:11}  {size:>11,} bytes" for kind, size in found.items() if size)])


def run(argv: list[str]) -> None:
    """Runs the command."""
    parser = _parser()
    arguments, config_flags = parser.parse_known_args(argv)
    if config_flags and not arguments.half:
        parser.error(f"unrecognized arguments: {' '.join(config_flags)}; --config goes with --half")
    config = _config(config_flags, arguments.split)
    if arguments.target.exists() or arguments.target.is_symlink():  # before the work
        raise UserError(f"{arguments.target} exists; delete it or choose another target")
    with process.on_cpu():  # there is nothing to compute
        with ProgressBar("exporting", 3) as bar:
            read = runs.load_model(arguments.source, kind=arguments.checkpoint, ema=arguments.ema)
            model = whole = pack(read)
            if arguments.half:
                model = halved(whole)
            bar.advance()
            writer = write_program if arguments.format == "stablehlo" else write_packed
            writer(model, arguments.target, version("bvit_jax"))
            bar.advance()
            report = _report(model, read, arguments)
            bar.advance()
        print(report)
    if config is not None:
        print(_compared(whole, model, arguments.target, config))


def _config(flags: Sequence[str], split: str | None) -> ConfigDict | None:
    """Returns the configuration of the data for a comparison, None where none is asked for."""
    if not flags:
        if split is not None:
            raise UserError(f"--split={split} is one of the data set of --config; add --half --config=NAME")
        return None
    config = parse_config(flags)
    if split is not None:
        config.data.eval_split = split
    return config


def _compared(whole: Packed, half: Packed, path: Path, config: ConfigDict) -> str:
    from bvit_jax.inference.evaluation import compare

    process.prepare_to_compute()
    found = compare(whole, half, path, config)
    shares = " and ".join(f"{100 * share:.2f} %" for share in found.top1)
    return (
        f"float32 and float16 on {found.images:,} images of {config.data.eval_split}: top-1 {shares},"
        f" {found.changed:,} images change"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bvit export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=any_path, metavar="SOURCE")
    parser.add_argument("target", type=local_path, metavar="TARGET")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    parser.add_argument("--checkpoint", choices=("latest", "best"), help="of a workdir (default: latest)")
    add_noema(parser)
    parser.add_argument("--half", action="store_true", help="numbers per channel and positions in float16")
    parser.add_argument("--split", help="of the data set of --config, in place of its evaluation split")
    return parser
