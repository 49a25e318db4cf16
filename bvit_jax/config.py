"""The tree of settings of a run: every key, its default, and the checks made before any work."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bvit_jax.errors import UserError
from bvit_jax.optim.rules import parse_rules

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CHOICES: dict[str, tuple[str, ...]] = {
    "compute_dtype": ("float32", "bfloat16"),
    "data.crop_interpolation": ("bilinear", "bicubic", "random"),
    "data.eval_interpolation": ("bilinear", "bicubic"),
    "erase.mode": ("pixel", "rand", "const"),
    "loss.teacher_targets": ("soft", "hard"),
    "mix.mode": ("batch", "pair", "elem"),
    "optim.schedule": ("cosine", "cosine_by_epoch"),
    "packed": ("auto", "on", "off"),
    "remat": ("none", "block", "dots", "products"),
}
POSITIVE = (
    "accumulate_steps",
    "batch_size",
    "eval_batch_size",
    "epochs",
    "eval_every_epochs",
    "log_every_steps",
    "checkpoint.keep",
    "loss.ranking_every",
    "loss.ranking_margin",
    "mesh.fsdp",
    "data.eval_resize",
    "data.repeats",
    "optim.learning_rate",
    "optim.lr_scale_batch",
    "optim.eps",
)
NOT_NEGATIVE = (
    "checkpoint.every_steps",
    "data.max_bad_images",
    "data.num_threads",
    "data.prefetch",
    "loss.ranking_weight",
    "mix.cutmix_alpha",
    "mix.mixup_alpha",
    "optim.weight_decay",
    "optim.warmup_epochs",
    "optim.warmup_learning_rate",
    "optim.min_learning_rate",
    "optim.clip_grad_norm",
)
FRACTIONS = (
    "ema.decay",
    "erase.prob",
    "loss.distillation_weight",
    "loss.label_smoothing",
    "mix.prob",
    "mix.switch_prob",
    "optim.b1",
    "optim.b2",
)


def default_config() -> ConfigDict:
    """Returns the settings common to all experiments: the binary ImageNet recipe, without a model.

    Sizes in images or steps, learning rates per ``optim.lr_scale_batch`` images, times in epochs
    where the name says so. A value of 0 switches off what it controls where noted.
    """
    config = ConfigDict()
    config.seed = 0
    config.compute_dtype = "float32"  # of activations and products; parameters stay float32
    config.batch_size = 512  # global
    config.eval_batch_size = 512  # global
    config.accumulate_steps = 1  # microbatches of a step, one after the other; their gradients are averaged
    # What a backward pass computes again: "block" all of a block, "dots" not its products with weights,
    # "products" not those either, which are kept as whole numbers of one or two bytes.
    config.remat = "none"
    config.one_pass_norms = (
        False  # whether batch norms take mean and variance in one pass, with one all-reduce
    )
    config.scan_blocks = False  # whether the identical blocks of a stage are compiled once, as a loop
    config.packed = "auto"  # whether signs are packed into bits and blocks run in a loop: "auto", on one CPU
    config.epochs = 300
    config.eval_every_epochs = 1
    config.log_every_steps = 100
    config.health = True  # log what the binary layers do, such as the share of signs that flipped
    config.profile_steps = ()  # (first, end): trace these steps of this process with JAX's profiler
    config.model = ConfigDict()  # see bvit_jax.models.model_config

    config.mesh = mesh = ConfigDict()
    mesh.fsdp = 1  # devices that share one copy of the parameters and of the optimiser's state

    config.data = data = ConfigDict()
    data.dataset = "imagenet2012"
    data.data_dir = ""  # "": ~/tensorflow_datasets, or $TFDS_DATA_DIR
    data.train_split = "train"
    data.eval_split = "validation"
    data.crop_scale = (0.08, 1.0)  # share of the area
    data.crop_ratio = (3 / 4, 4 / 3)
    data.crop_interpolation = "bilinear"
    data.flip = True
    data.auto_augment = ""  # "": off, or a policy of timm's RandAugment such as rand-m9-mstd0.5-inc1
    data.color_jitter = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue; 0: off
    data.repeats = 1  # copies of an image in a batch, augmented differently
    data.eval_resize = 256  # short side in pixels, before the centre crop
    data.eval_interpolation = "bicubic"
    data.mean = IMAGENET_MEAN
    data.std = IMAGENET_STD
    data.max_bad_images = 0  # different images that may be undecodable, on each host
    data.num_workers = -1  # processes that load images; -1: some where there are many cores, else 0
    data.num_threads = 0  # in each of them; 0: chosen from the number of cores
    data.prefetch = 16  # decoded images waiting per thread

    config.erase = erase = ConfigDict()  # random erasing, on the device
    erase.prob = 0.0  # 0: off
    erase.mode = "pixel"  # noise; "rand": one random colour, "const": the mean colour

    config.mix = mix = ConfigDict()  # mixup and cutmix, on the device; the labels are mixed likewise
    mix.mixup_alpha = 0.0  # 0: no mixup
    mix.cutmix_alpha = 0.0  # 0: no cutmix
    mix.cutmix_minmax = ()  # shares of the side between which cutmix draws height and width, if given
    mix.prob = 1.0  # that a batch, pair or image is mixed at all
    mix.switch_prob = 0.5  # that it is cutmix, where both are on
    mix.mode = "batch"  # one draw for the batch; "pair", "elem": for two images, for each
    mix.correct_lam = True  # the labels' share is the area of the box inside of the image

    config.optim = optim = ConfigDict()
    optim.learning_rate = 5e-4
    optim.lr_scale_batch = 512  # the rate is for this batch and scales linearly with batch_size
    optim.schedule = "cosine"
    optim.min_learning_rate = 1e-5
    optim.warmup_epochs = 0
    optim.warmup_learning_rate = 1e-6
    optim.weight_decay = 0.0
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.clip_grad_norm = 0.0  # 0: off
    optim.rules = ()  # of (regex of paths, learning-rate factor, weight-decay factor); the first that fits

    config.ema = ema = ConfigDict()  # moving average of parameters and statistics
    ema.decay = 0.0  # share of the old average in the new; 0: off

    config.loss = loss = ConfigDict()
    loss.distillation_weight = 1.0  # the rest goes to the labels; 0: no teacher, except for ranking
    loss.teacher_targets = "soft"  # the teacher's probabilities; "hard": the class it prefers
    loss.label_smoothing = 0.1
    loss.ranking_weight = 0.0  # of the order of the teacher's attention probabilities; 0: off
    loss.ranking_margin = 0.1  # between two keys, in units of the mean probability
    loss.ranking_layers = ()  # blocks in order of execution, from 0; (): all
    loss.ranking_every = 2  # of so many images one is ranked

    config.init = init = ConfigDict()  # what a new run starts from; one that continues does not read it
    init.path = ""  # "": random, or the workdir of a run, or anything that python -m bvit_jax.convert reads

    config.teacher = teacher = ConfigDict()
    teacher.path = ""  # anything that python -m bvit_jax.convert reads, such as DeiT-S's .pth

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 0  # 0: once an epoch
    checkpoint.keep = 2
    return config


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first key whose value is out of range."""

    def get(key: str) -> Any:
        node = config
        for part in key.split("."):
            node = node[part]
        return node

    for key, choices in CHOICES.items():
        if get(key) not in choices:
            raise UserError(f"config.{key} is {get(key)!r}; expected one of {', '.join(choices)}")
    for key in POSITIVE:
        if not get(key) > 0:
            raise UserError(f"config.{key} is {get(key)}; expected a number above 0")
    for key in NOT_NEGATIVE:
        if not get(key) >= 0:
            raise UserError(f"config.{key} is {get(key)}; expected a number of at least 0")
    for key in FRACTIONS:
        if not 0 <= get(key) <= 1:
            raise UserError(f"config.{key} is {get(key)}; expected a number from 0 to 1")
    _check_profile(config)
    if config.ema.decay == 1:
        raise UserError("config.ema.decay is 1, which would keep the initial weights; expected below 1")
    if type(config.accumulate_steps) is not int:
        raise UserError(f"config.accumulate_steps is {config.accumulate_steps}; expected a whole number")
    parse_rules(config.optim.rules)
    _check_mixing(config)
    _check_data(config)
    _check_ranking(config)
    if "name" not in config.model:
        raise UserError("config.model has no name; build it with bvit_jax.models.model_config")


def _check_profile(config: ConfigDict) -> None:
    steps = tuple(config.profile_steps)
    whole = all(type(step) is int for step in steps)
    if steps and not (whole and len(steps) == 2 and 1 <= steps[0] < steps[1]):
        raise UserError(
            f"config.profile_steps is {config.profile_steps!r}; expected () or two ascending whole numbers"
            " from 1, such as (10, 15)"
        )


def _check_mixing(config: ConfigDict) -> None:
    mix = config.mix
    minmax = tuple(mix.cutmix_minmax)
    if minmax and not (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1):
        raise UserError(
            f"config.mix.cutmix_minmax is {mix.cutmix_minmax!r}; expected () or two ascending numbers"
            " from 0 to 1"
        )
    if config.batch_size % 2 and (mix.mixup_alpha or mix.cutmix_alpha or minmax):
        raise UserError(f"config.batch_size is {config.batch_size}; expected an even number, to mix pairs")


def _check_ranking(config: ConfigDict) -> None:
    layers, every = tuple(config.loss.ranking_layers), config.loss.ranking_every
    images = config.batch_size // config.accumulate_steps
    if config.loss.ranking_weight and (type(every) is not int or images % every):
        raise UserError(
            f"config.loss.ranking_every is {every}; expected a whole number that divides the {images} images"
            " of a microbatch, config.batch_size / config.accumulate_steps, such as 1"
        )
    if not all(type(layer) is int and layer >= 0 for layer in layers) or len(set(layers)) < len(layers):
        raise UserError(
            f"config.loss.ranking_layers is {config.loss.ranking_layers!r}; expected () or different whole"
            " numbers from 0, such as (0, 5, 11)"
        )


def _check_data(config: ConfigDict) -> None:
    from bvit_jax.data import train_augment  # here, because reading a config needs none of its packages

    train_augment(config.data)


def save(config: ConfigDict, path: Path) -> None:
    """Writes the resolved configuration as JSON."""
    path.write_text(json.dumps(config.to_dict(), indent=2, default=str) + "\n")


def load(path: Path) -> ConfigDict:
    """Reads a configuration written by `save`.

    Raises:
      UserError: the file is missing or is not such a configuration.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}; expected a workdir of train.py") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; expected the JSON that train.py wrote") from error
    defaults = default_config().to_dict()
    sections = {key: value for key, value in defaults.items() if isinstance(value, dict)}
    if (
        not isinstance(values, dict)
        or not {"model", "data"} <= values.keys()
        or not all(isinstance(values.get(key, {}), dict) for key in sections)
    ):
        raise UserError(f"{path} is not the configuration of a run; expected a workdir of train.py")
    # A run of an older version lacks the settings that came later; their defaults change nothing.
    filled = {key: {**value, **values.get(key, {})} for key, value in sections.items()}
    return ConfigDict(_lists_to_tuples({**defaults, **values, **filled}))


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value
