"""The settings of a run: for each of them the default, the values allowed and a line of documentation.

A setting is declared once, in `SETTINGS`; `default_config`, `validate` and the tables of docs/settings.md are
made from that. Settings of models are in `bvit_jax.models.model_config`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from bvit_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Values:
    """The values that a setting may have.

    Attributes:
      expected: what they are, as it follows "expected" in a message.
      accept: returns whether a value is one of them.
      choices: all of them, where they have names.
    """

    expected: str
    accept: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


class Setting(NamedTuple):
    """One setting: its default, the values allowed and one line of documentation."""

    default: Any
    values: Values
    doc: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, tuple | list) and len(values) == count and all(map(_is_number, values))


def _are_ascending(values: Any) -> bool:
    return _are_numbers(values, 2) and values[0] < values[1]


def _are_blocks(values: Any) -> bool:
    return (
        isinstance(values, tuple | list)
        and all(_is_whole(value) and value >= 0 for value in values)
        and len(set(values)) == len(values)
    )


def _one_of(*choices: str) -> Values:
    return Values(f"one of {', '.join(choices)}", choices.__contains__, choices)


def _whole(at_least: int) -> Values:
    return Values(f"a whole number of at least {at_least}", lambda x: _is_whole(x) and x >= at_least)


FLAG = Values("True or False", lambda x: isinstance(x, bool))
AUTO_FLAG = Values("auto, True or False", lambda x: x == "auto" or isinstance(x, bool))
TEXT = Values("text", lambda x: isinstance(x, str))
POSITIVE = Values("a number above 0", lambda x: _is_number(x) and x > 0)
NOT_NEGATIVE = Values("a number of at least 0", lambda x: _is_number(x) and x >= 0)
FRACTION = Values("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1)
SEED = Values("a whole number from 0 to 4294967295", lambda x: _is_whole(x) and 0 <= x < 2**32)
DECAY = Values(
    "a number from 0 to below 1, since 1 would keep the initial weights",
    lambda x: _is_number(x) and 0 <= x < 1,
)
PROFILE_STEPS = Values(
    "() or two ascending whole numbers from 1, such as (10, 15)",
    lambda x: x in ((), []) or (_are_ascending(x) and all(map(_is_whole, x)) and x[0] >= 1),
)
COLOURS = Values("a number for each of three colours", lambda x: _are_numbers(x, 3))
CROP_SCALE = Values(
    "two ascending numbers above 0, at most 1", lambda x: _are_numbers(x, 2) and 0 < x[0] <= x[1] <= 1
)
CROP_RATIO = Values("two ascending numbers above 0", lambda x: _are_numbers(x, 2) and 0 < x[0] <= x[1])
COLOR_JITTER = Values(
    "brightness, contrast and saturation of at least 0 and a hue from 0 to 0.5",
    lambda x: any(_are_numbers(x, n) for n in (1, 2, 3, 4)) and min(x) >= 0 and max(x[3:], default=0) <= 0.5,
)
CUTMIX_MINMAX = Values(
    "() or two ascending numbers from 0 to 1",
    lambda x: x in ((), []) or (_are_ascending(x) and x[0] >= 0 and x[1] <= 1),
)
RULES = Values(
    "a tuple of rules (regular expression, factor of the learning rate, factor of the weight decay)",
    lambda x: isinstance(x, tuple | list),
)
BLOCKS = Values("() or different whole numbers from 0, such as (0, 5, 11)", _are_blocks)

# The parts of a configuration, in order; "" is what is directly in it.
SECTIONS = {
    "": "The run as a whole.",
    "model": "The network: see `bvit_jax.models.model_config`.",
    "mesh": "How the devices share the work.",
    "data": "The images, on the host.",
    "erase": "Random erasing, on the device.",
    "mix": "Mixup and cutmix, on the device; the labels are mixed with the images.",
    "optim": "AdamW and the learning rate.",
    "ema": "Moving average of parameters and statistics.",
    "loss": "What is minimised.",
    "init": "What a new run starts from.",
    "teacher": "The network that the student learns from.",
    "checkpoint": "What is saved during the run.",
}

SETTINGS = {
    "seed": Setting(
        0, SEED, "Seed of the initial weights, the order of the images, augmentation and dropout."
    ),
    "compute_dtype": Setting(
        "float32",
        _one_of("float32", "bfloat16"),
        "Type of activations and products; parameters stay float32.",
    ),
    "batch_size": Setting(512, _whole(1), "Images per training step, over all devices."),
    "eval_batch_size": Setting(512, _whole(1), "Images per evaluation step, over all devices."),
    "accumulate_steps": Setting(
        1, _whole(1), "Microbatches per step, run one after the other; their gradients are averaged."
    ),
    "remat": Setting(
        "auto",
        _one_of("auto", "none", "block", "dots", "products"),
        "What is saved for the backward pass: everything (`none`), inputs of blocks (`block`), also products"
        " with weights (`dots`), or also integer products and batch statistics (`products`); `auto`: what is"
        " best on these devices without changing what is computed.",
    ),
    "one_pass_norms": Setting(
        False, FLAG, "Whether batch norms compute mean and variance in one pass, with one all-reduce."
    ),
    "scan_blocks": Setting(
        "auto",
        AUTO_FLAG,
        "Whether the identical blocks of a stage are compiled once and run as a loop; `auto`: where signs are"
        " packed and no dropout mask would change.",
    ),
    "packed": Setting(
        "auto",
        _one_of("auto", "on", "off"),
        "Whether signs are packed into bits and blocks run as a loop; `auto`: on a single CPU.",
    ),
    "epochs": Setting(300, _whole(1), "Length of the run."),
    "eval_every_epochs": Setting(1, _whole(1), "Epochs between evaluations."),
    "log_every_steps": Setting(100, _whole(1), "Steps between log lines."),
    "health": Setting(
        True, FLAG, "Whether to log what binary layers do, such as the share of flipped signs."
    ),
    "profile_steps": Setting(
        (),
        PROFILE_STEPS,
        "First step and end of a trace by JAX's profiler, counted in this process; `()`: none.",
    ),
    "mesh.fsdp": Setting(
        1, _whole(1), "Devices that share one copy of the parameters and of the optimiser's state."
    ),
    "data.dataset": Setting("imagenet2012", TEXT, "A TFDS name, `name[/config][:version]`."),
    "data.data_dir": Setting(
        "", TEXT, "The TFDS directory; empty: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`."
    ),
    "data.train_split": Setting(
        "train", TEXT, "The TFDS split to train on, such as `train` or `train[:10%]`."
    ),
    "data.eval_split": Setting("validation", TEXT, "The TFDS split to evaluate on."),
    "data.crop_scale": Setting(
        (0.08, 1.0), CROP_SCALE, "Range of the share of the image's area that a random crop covers."
    ),
    "data.crop_ratio": Setting((3 / 4, 4 / 3), CROP_RATIO, "Range of width / height of a random crop."),
    "data.crop_interpolation": Setting(
        "bilinear", _one_of("bilinear", "bicubic", "random"), "How random crops are resized."
    ),
    "data.flip": Setting(True, FLAG, "Whether half of the training images are mirrored."),
    "data.auto_augment": Setting(
        "", TEXT, "A policy of timm's RandAugment such as `rand-m9-mstd0.5-inc1`; empty: off."
    ),
    "data.color_jitter": Setting(
        (0.0, 0.0, 0.0, 0.0),
        COLOR_JITTER,
        "Strengths of torchvision's color jitter; 0 leaves a property alone.",
    ),
    "data.repeats": Setting(1, _whole(1), "Copies of an image in a batch, augmented differently."),
    "data.eval_resize": Setting(
        256, _whole(1), "Short side in pixels to which evaluation resizes before its centre crop."
    ),
    "data.eval_interpolation": Setting("bicubic", _one_of("bilinear", "bicubic"), "How evaluation resizes."),
    "data.mean": Setting(IMAGENET_MEAN, COLOURS, "Mean of each colour, subtracted from pixels in [0, 1]."),
    "data.std": Setting(
        IMAGENET_STD, COLOURS, "Standard deviation of each colour, by which they are divided."
    ),
    "data.max_bad_images": Setting(
        0, _whole(0), "Different images per host that may be undecodable before the run stops."
    ),
    "data.num_workers": Setting(
        -1, _whole(-1), "Processes that load images; -1: some if there are many cores, otherwise 0."
    ),
    "data.num_threads": Setting(
        0, _whole(0), "Threads per process that load images; 0: as many as suit the cores."
    ),
    "data.prefetch": Setting(16, _whole(0), "Decoded images waiting per thread."),
    "erase.prob": Setting(0.0, FRACTION, "Probability that a box of an image is erased; 0: off."),
    "erase.mode": Setting(
        "pixel",
        _one_of("pixel", "rand", "const"),
        "What fills the box: noise (`pixel`), one random colour (`rand`) or the mean colour (`const`).",
    ),
    "mix.mixup_alpha": Setting(0.0, NOT_NEGATIVE, "Shares of mixup follow Beta(alpha, alpha); 0: off."),
    "mix.cutmix_alpha": Setting(0.0, NOT_NEGATIVE, "Shares of cutmix follow Beta(alpha, alpha); 0: off."),
    "mix.cutmix_minmax": Setting(
        (),
        CUTMIX_MINMAX,
        "If given, cutmix is on, and the sides of its box are drawn from this range of shares.",
    ),
    "mix.prob": Setting(1.0, FRACTION, "Probability that a batch, pair or image is mixed at all."),
    "mix.switch_prob": Setting(0.5, FRACTION, "Probability of cutmix where mixup is on too."),
    "mix.mode": Setting(
        "batch",
        _one_of("batch", "pair", "elem"),
        "Whether to draw once per batch, per pair of images or per image.",
    ),
    "mix.correct_lam": Setting(
        True, FLAG, "Whether the labels' share is the area of the box inside the image."
    ),
    "optim.learning_rate": Setting(5e-4, POSITIVE, "Peak of the schedule for `lr_scale_batch` images."),
    "optim.lr_scale_batch": Setting(
        512, _whole(1), "Batch size of that peak, which scales linearly with `batch_size`."
    ),
    "optim.schedule": Setting(
        "cosine",
        _one_of("cosine", "cosine_by_epoch"),
        "A cosine over the run that changes every step or every epoch.",
    ),
    "optim.min_learning_rate": Setting(1e-5, NOT_NEGATIVE, "End of the schedule."),
    "optim.warmup_epochs": Setting(0, _whole(0), "Length of the linear warm-up; 0: none."),
    "optim.warmup_learning_rate": Setting(1e-6, NOT_NEGATIVE, "Start of the warm-up."),
    "optim.weight_decay": Setting(
        0.0, NOT_NEGATIVE, "Decoupled weight decay, of arrays of two or more dimensions."
    ),
    "optim.b1": Setting(0.9, FRACTION, "Decay of Adam's first moment."),
    "optim.b2": Setting(0.999, FRACTION, "Decay of Adam's second moment."),
    "optim.eps": Setting(1e-8, POSITIVE, "Adam's epsilon."),
    "optim.clip_grad_norm": Setting(0.0, NOT_NEGATIVE, "Largest norm of all gradients together; 0: off."),
    "optim.rules": Setting((), RULES, "For parameters whose path matches; the first match counts."),
    "ema.decay": Setting(0.0, DECAY, "Share of the old average in the new one; 0: off."),
    "loss.distillation_weight": Setting(
        1.0,
        FRACTION,
        "Weight of the teacher's term; the labels have the rest. 0: no teacher, except for ranking.",
    ),
    "loss.teacher_targets": Setting(
        "soft",
        _one_of("soft", "hard"),
        "Targets are the teacher's probabilities (`soft`) or its preferred class (`hard`).",
    ),
    "loss.label_smoothing": Setting(0.1, FRACTION, "Share of a target that goes to all classes equally."),
    "loss.ranking_weight": Setting(
        0.0, NOT_NEGATIVE, "Weight of the loss on the order of the teacher's attention probabilities; 0: off."
    ),
    "loss.ranking_margin": Setting(
        0.1, POSITIVE, "Margin between two keys, in units of the mean attention probability."
    ),
    "loss.ranking_layers": Setting((), BLOCKS, "Blocks that are ranked, in execution order; `()`: all."),
    "loss.ranking_every": Setting(2, _whole(1), "One of this many images is ranked."),
    "init.path": Setting(
        "", TEXT, "A workdir, or anything that `python -m bvit_jax.convert` reads; empty: random."
    ),
    "teacher.path": Setting("", TEXT, "Anything that `python -m bvit_jax.convert` reads, such as a `.pth`."),
    "checkpoint.every_steps": Setting(0, _whole(0), "Steps between checkpoints; 0: an epoch."),
    "checkpoint.keep": Setting(2, _whole(1), "Checkpoints kept, in addition to the best."),
}


def default_config() -> ConfigDict:
    """Returns the settings common to all experiments: the binary ImageNet recipe, without a model."""
    config = ConfigDict()
    for section in SECTIONS:
        defaults = {name: _default(setting) for name, setting in settings_of(section).items()}
        config.update({section: defaults} if section else defaults)
    return config


def _default(setting: Setting) -> Any:
    # ConfigDict would take nothing but text in place of "auto".
    auto = setting.values is AUTO_FLAG
    return FieldReference(setting.default, field_type=object) if auto else setting.default


def settings_of(section: str) -> dict[str, Setting]:
    """Returns the settings of one of `SECTIONS` by their names in it."""
    split = {key: key.rpartition(".")[::2] for key in SETTINGS}
    return {name: SETTINGS[key] for key, (own, name) in split.items() if own == section}


def check(key: str, value: Any) -> None:
    """Raises `UserError` unless the setting ``key``, such as ``"optim.eps"``, may have this value."""
    values = SETTINGS[key].values
    if not values.accept(value):
        raise UserError(f"config.{key} is {value!r}; expected {values.expected}")


def check_section(section: str, settings: ConfigDict) -> None:
    """Raises `UserError` naming the first setting of ``config.SECTION`` whose value is not allowed."""
    for name in settings_of(section):
        check(f"{section}.{name}".lstrip("."), settings[name])


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first setting whose value is not allowed or conflicts with another.

    Settings of the model, and what is inside ``optim.rules`` and ``data.auto_augment``, are checked by the
    packages that read them.
    """
    for section in SECTIONS:
        check_section(section, config[section] if section else config)
    _check_mixing(config)
    _check_ranking(config)
    if "name" not in config.model:
        raise UserError("config.model has no name; build it with bvit_jax.models.model_config")


def _check_mixing(config: ConfigDict) -> None:
    mix = config.mix
    if config.batch_size % 2 and (mix.mixup_alpha or mix.cutmix_alpha or mix.cutmix_minmax):
        raise UserError(f"config.batch_size is {config.batch_size}; expected an even number, to mix pairs")


def _check_ranking(config: ConfigDict) -> None:
    every, images = config.loss.ranking_every, config.batch_size // config.accumulate_steps
    if config.loss.ranking_weight and images % every:
        raise UserError(
            f"config.loss.ranking_every is {every}; expected a whole number that divides the {images} images"
            " of a microbatch, config.batch_size / config.accumulate_steps, such as 1"
        )


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
