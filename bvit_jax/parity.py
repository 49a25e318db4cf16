"""Compares our models with golden files of the PyTorch code: ``python -m bvit_jax.parity check FILE...``

A golden file (``.npz``) holds a model's configuration, weights and inputs and everything the PyTorch
code computed from them in float64; ``docs/parity.md`` describes the format. Arrays are compared by
the worst absolute difference over the largest magnitude of the file's array; a gradient's scale is at
least 1e-4 of the largest gradient in the file, because a shift in front of a batch norm has a gradient
of zero by cancellation, 1e-17 on both sides.
"""

import argparse
import functools
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from bvit_jax import losses, models, optim
from bvit_jax.config import default_config
from bvit_jax.errors import UserError
from bvit_jax.pretrained import BUFFERS, Variables, abstract_variables, from_state_dict
from bvit_jax.torch_names import to_state_dict

FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-6  # for arrays stored in float32
GRADIENT_FLOOR = 1e-4  # of the largest gradient
CANCELLED = 1e-13  # of the largest gradient: below it there is only noise
EXIT_FAILED, EXIT_UNREADABLE = 1, 2

Arrays = dict[str, np.ndarray]

# What numpy, zipfile and json raise for damaged files, and for files of another kind.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Row:
    """The comparison of one group of arrays.

    Attributes:
      group: what was compared.
      count: number of arrays.
      error: worst relative error, infinite where an array is missing or of another shape.
      where: name of the array with the worst error.
      ratio: worst error over its tolerance.
    """

    group: str
    count: int
    error: float
    where: str
    ratio: float

    @property
    def passed(self) -> bool:
        return self.ratio <= 1  # False for NaN


class GoldenFile:
    """A golden file in memory.

    Raises:
      UserError: the file is missing, damaged, or not a golden file of a supported model.
    """

    def __init__(self, path: Path) -> None:
        try:
            # Opened here, because numpy does not close what it cannot read.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                self.arrays: Arrays = {name: archive[name] for name in archive.files}
            self.meta: dict[str, Any] = dict(json.loads(str(self.arrays.pop("meta")[()])))
        except FileNotFoundError:
            raise UserError(f"no file {path}; expected a golden .npz file") from None
        except KeyError:
            raise UserError(f"{path} has no 'meta': it is not a golden file") from None
        except _UNREADABLE as error:
            raise UserError(f"cannot read {path}: {error}; expected a golden .npz file") from error

    def group(self, prefix: str) -> Arrays:
        """Returns the arrays whose names start with ``prefix/``, under the rest of their names."""
        start = prefix + "/"
        return {n[len(start) :]: a for n, a in self.arrays.items() if n.startswith(start)}

    def array(self, name: str) -> np.ndarray:
        """Returns one array; raises `UserError` if there is none."""
        if name not in self.arrays:
            raise UserError(f"the golden file has no array {name!r}")
        return self.arrays[name]

    def float64(self, name: str) -> np.ndarray:
        """Returns one array in float64."""
        return self.array(name).astype(np.float64)

    def images(self, name: str = "input/images") -> np.ndarray:
        """Returns images in float64, channels last; leading axes are kept."""
        return np.moveaxis(self.float64(name), -3, -1)


# --- comparing ---------------------------------------------------------------------------------


def compare(
    group: str,
    ours: Mapping[str, Any],
    golden: Mapping[str, np.ndarray],
    floors: Mapping[str, float] | None = None,
) -> Row:
    """Compares arrays name by name; ``floors`` holds the least scale that errors are divided by."""
    floors = floors or {}
    errors = {}
    for name in sorted(golden.keys() | ours.keys()):
        if name not in ours or name not in golden or np.shape(ours[name]) != golden[name].shape:
            errors[name] = (np.inf, np.inf)
            continue
        file = golden[name]
        difference = np.abs(np.asarray(ours[name], np.float64) - file.astype(np.float64))
        scale = max(float(np.max(np.abs(file), initial=0)), floors.get(name, 0.0)) or 1.0
        error = float(np.max(difference, initial=0)) / scale
        narrow = file.dtype != np.float64
        errors[name] = (error, error / (FLOAT32_TOLERANCE if narrow else FLOAT64_TOLERANCE))
    where, (error, ratio) = max(
        errors.items(), key=lambda item: np.inf if np.isnan(item[1][1]) else item[1][1]
    )
    return Row(group, len(errors), error, where, ratio)


def check(path: Path) -> Iterator[Row]:
    """Runs our model on a golden file in float64 and yields one row per group, as they are done.

    Raises:
      UserError: the file cannot be read, or holds a model or state dict that does not fit.
    """
    golden = GoldenFile(path)
    config = config_of(golden.meta)
    with jax.enable_x64(True):
        yield from _check_model(golden, config)


def config_of(meta: Mapping[str, Any]) -> ConfigDict:
    """Returns our model configuration for the ``meta`` of a golden file of the BinaryViT code.

    The reference spells a model as a base configuration, overrides of it, and command-line switches.
    """
    try:
        name = {"extra-res-pyramid": "binaryvit", "extra-res": "extra_res", "deit": "deit"}[
            meta["model_type"]
        ]
        args, overrides = meta["args"], meta["config"]
        settings: dict[str, Any] = {"num_classes": meta["num_classes"], "norm_epsilon": 1e-5}
        settings["drop_path"] = args["drop_path"]
        for theirs, ours in _REFERENCE_KEYS.items():
            if theirs in overrides:
                value = overrides[theirs]
                settings[ours] = tuple(value) if isinstance(value, list) else value
        if name != "deit":
            settings["weight_bits"], settings["act_bits"] = meta["weight_bits"], meta["input_bits"]
            settings["norm"] = "batch_norm" if args["replace_ln_bn"] else "layer_norm"
            settings["layer_scale"] = not args["disable_layerscale"]
            settings["pool_branches"] = tuple(k for k in (3, 5) if args[f"avg_res{k}"])
        if name == "extra_res":
            settings["class_token"] = args["enable_cls_token"]
        if name == "binaryvit":
            settings["some_fp"] = args["some_fp"]
    except (KeyError, TypeError) as error:
        raise UserError(f"the golden file's meta has no or an unknown {error}") from error
    return models.model_config(name, **settings)


_REFERENCE_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "depths": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "reduction_ratio": "reduction",
    "clip_val": "clip_val",
}


def _check_model(golden: GoldenFile, config: ConfigDict) -> Iterator[Row]:
    model = models.create_model(config, jnp.float64)
    abstract = abstract_variables(model, config.image_size)
    size = (config.image_size, config.image_size, 3)
    if golden.images().shape[1:] != size:
        raise UserError(f"its images are {golden.images().shape[1:]}; its model takes {size}")
    variables = from_state_dict(golden.group("state"), abstract, np.float64)
    yield _compare_inputs(golden, config)

    apply = jax.jit(functools.partial(model.apply, capture=True))
    output = apply(variables, golden.images())
    yield compare("eval logits", {"": output.logits}, {"": golden.array("eval/logits")})
    for group, ours in (("hidden", output.hidden_states), ("attention", output.attentions)):
        if theirs := golden.group(f"eval/{group}"):
            # Only what the file holds: files may leave out the large arrays.
            named = {str(i): array for i, array in enumerate(ours) if str(i) in theirs}
            yield compare(f"eval {group}", named, theirs)

    yield from _check_training(golden, model, variables)
    if "steps/lr" in golden.arrays:
        yield from _check_steps(golden, model, variables)


def _compare_inputs(golden: GoldenFile, config: ConfigDict) -> Row:
    """Checks what the format promises of weights and inputs: float16 holds them exactly.

    A parameter such as a key's bias has no influence on anything that is computed, so only this can
    tell that it was damaged. The constants among the buffers must be those of the configuration.
    """
    theirs = {f"state/{name}": array for name, array in golden.group("state").items()}
    theirs |= {f"input/{name}": array for name, array in golden.group("input").items()}
    ours = {
        name: array.astype(np.float16).astype(array.dtype)
        for name, array in theirs.items()
        if array.dtype.kind == "f"
    }
    for name in theirs:
        if name.endswith(("weight_clip_val", "act_clip_val")):
            ours[name] = np.array([-config.clip_val, config.clip_val])
        elif name not in ours:  # counters
            ours[name] = np.asarray(theirs[name])
    return compare("inputs", ours, theirs)


def _loss(model: nn.Module) -> Any:
    """Returns the reference's training loss as a function whose gradient is taken."""

    def loss(params: Any, images: Any, statistics: Any, teacher_logits: Any) -> tuple[Any, Any]:
        output, updates = model.apply(
            {"params": params, "batch_stats": statistics},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        value = jnp.mean(losses.soft_cross_entropy(output.logits, teacher_logits))
        return value, (output.logits, updates.get("batch_stats", {}))

    return loss


def _check_training(golden: GoldenFile, model: nn.Module, variables: Variables) -> Iterator[Row]:
    gradient = jax.jit(jax.value_and_grad(_loss(model), argnums=(0, 1), has_aux=True))
    (loss, (logits, statistics)), (to_params, to_images) = gradient(
        variables["params"],
        golden.images(),
        variables.get("batch_stats", {}),
        golden.float64("input/teacher_logits"),
    )
    yield compare("train logits", {"": logits}, {"": golden.array("train/logits")})
    yield compare("loss", {"": loss}, {"": golden.array("train/loss")})
    if theirs := golden.group("grad"):
        ours = to_state_dict({"params": to_params})
        floor = GRADIENT_FLOOR * max(_magnitudes(theirs).values())
        yield compare("gradients", ours, theirs, dict.fromkeys(theirs, floor))
    if theirs := golden.group("grad_input"):
        yield compare("input gradient", {"images": np.moveaxis(to_images, -1, -3)}, theirs)
    if theirs := golden.group("train_state"):
        ours = to_state_dict({"batch_stats": statistics}) | _buffers(golden, theirs, steps=1)
        yield compare("running statistics", ours, theirs)


def _magnitudes(arrays: Arrays) -> dict[str, float]:
    return {name: float(np.max(np.abs(array), initial=0)) for name, array in arrays.items()}


def _buffers(golden: GoldenFile, expected: Arrays, steps: int) -> Arrays:
    """Returns those of the ``expected`` arrays that are PyTorch's buffers, ``steps`` batches later."""
    return {
        name: array + steps if name.endswith(".num_batches_tracked") else array
        for name, array in golden.group("state").items()
        if name in expected and name.rpartition(".")[2] in BUFFERS
    }


def _check_steps(golden: GoldenFile, model: nn.Module, variables: Variables) -> Iterator[Row]:
    settings = default_config().optim
    try:
        described = golden.meta["optimizer"]
        settings.b1, settings.b2 = described["betas"]
        settings.eps, settings.weight_decay = described["eps"], described["weight_decay"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its meta does not describe the optimizer: {error!r}") from error
    rates = golden.float64("steps/lr")
    optimizer = optim.make_optimizer(settings, lambda step: jnp.asarray(rates)[step])
    gradient = jax.value_and_grad(_loss(model), has_aux=True)

    @jax.jit
    def step(params: Any, statistics: Any, state: Any, images: Any, teacher: Any) -> tuple:
        (loss, (_, statistics)), grads = gradient(params, images, statistics, teacher)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state, loss

    params, statistics = variables["params"], variables.get("batch_stats", {})
    state, steps = optimizer.init(params), []
    for images, teacher in zip(
        golden.images("steps/images"), golden.float64("steps/teacher_logits"), strict=True
    ):
        params, statistics, state, loss = step(params, statistics, state, images, teacher)
        steps.append(loss)
    yield compare("step losses", {"": np.array(steps)}, {"": golden.array("steps/loss")})
    theirs = golden.group("steps/final")
    ours = to_state_dict({"params": params, "batch_stats": statistics})
    ours |= _buffers(golden, theirs, len(steps))
    yield compare("final state", ours, theirs, _final_floors(golden, rates.sum() / settings.eps))


def _final_floors(golden: GoldenFile, amplification: float) -> dict[str, float]:
    """Returns the least scales of final parameters whose gradient is zero by cancellation.

    What is left of such a gradient is the rounding noise of either side, and Adam's normaliser
    amplifies it by up to the sum of the learning rates over epsilon. The difference allowed is the one
    that the check of the gradients allows, amplified.
    """
    gradients = _magnitudes(golden.group("grad"))
    largest = max(gradients.values(), default=0.0)
    return {
        name: GRADIENT_FLOOR * largest * amplification
        for name, gradient in gradients.items()
        if gradient < CANCELLED * largest
    }


# --- the command -------------------------------------------------------------------------------


def _report(path: Path) -> int:
    """Prints the table of one file and returns the exit status it calls for."""
    print(path)
    try:
        rows = []
        for row in check(path):
            rows.append(row)
            verdict = "pass" if row.passed else "FAIL"
            name = row.where or row.group
            print(f"  {row.group:<20}{row.count:>5}  {row.error:9.2e}  {verdict}  {name}", flush=True)
    except UserError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    return 0 if all(row.passed for row in rows) else EXIT_FAILED


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 if all files pass, 1 if one fails, 2 if one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bvit_jax.parity", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="compare our models with golden files")
    checker.add_argument("files", nargs="+", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # float64 on every machine
    return max([_report(path) for path in arguments.files])


if __name__ == "__main__":
    sys.exit(main())
