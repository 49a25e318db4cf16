"""The settings of a run: for each of them the default, the values allowed and a line of documentation.

A setting is declared once, in `SETTINGS`; `default_config`, `validate` and the tables of docs/settings.md are
made from that. Settings of models are in `bvit_jax.models.model_config`.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from bvit_jax.config.values import (
    AUTO_FLAG,
    BELOW_ONE,
    BLOCKS,
    COLOR_JITTER,
    CROP_RATIO,
    CROP_SCALE,
    CUTMIX_MINMAX,
    DECAY,
    FLAG,
    FRACTION,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MEANS,
    NOT_NEGATIVE,
    POSITIVE,
    PROFILE_STEPS,
    RULES,
    SEED,
    STDS,
    TEXT,
    Values,
    one_of,
    whole,
)
from bvit_jax.errors import UserError


class Setting(NamedTuple):
    """One setting.

    Attributes:
      default: where an experiment says nothing.
      values: those allowed.
      doc: one line of documentation.
      free: whether a run may continue with another value: it means the same model and the same steps.
    """

    default: Any
    values: Values
    doc: str
    free: bool = False


# The parts of a configuration, in order; "" is what is directly in it.
SECTIONS = {
    "": "The run as a whole.",
    "model": "The network. Each model has its own settings: [The models](models.md#settings).",
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
        one_of("float32", "bfloat16"),
        "Type of activations and products; parameters stay float32.",
    ),
    "matmul_precision": Setting(
        "default",
        one_of("default", "high", "highest"),
        "Products of float32 numbers: as JAX computes them, in bfloat16 on TPUs and in TF32 on GPUs"
        " (`default`), in three passes of bfloat16 or in TF32 (`high`), or in float32 (`highest`).",
        free=True,
    ),
    "batch_size": Setting(512, whole(1), "Images per training step, over all devices."),
    "eval_batch_size": Setting(512, whole(1), "Images per evaluation step, over all devices.", free=True),
    "accumulate_steps": Setting(
        1, whole(1), "Microbatches per step, run one after the other; their gradients are averaged."
    ),
    "remat": Setting(
        "auto",
        one_of("auto", "none", "block", "dots", "products"),
        "What is saved for the backward pass: everything (`none`), inputs of blocks (`block`), also products"
        " with weights (`dots`), or also integer products and batch statistics (`products`); `auto`: what is"
        " best on these devices without changing what is computed.",
        free=True,
    ),
    "one_pass_norms": Setting(
        False,
        FLAG,
        "Whether batch norms compute mean and variance in one pass, with one all-reduce.",
        free=True,
    ),
    "scan_blocks": Setting(
        "auto",
        AUTO_FLAG,
        "Whether the identical blocks of a stage are compiled once and run as a loop; `auto`: where signs are"
        " packed and no dropout mask would change.",
        free=True,
    ),
    "packed": Setting(
        "auto",
        one_of("auto", "on", "off"),
        "Whether signs are packed into bits and blocks run as a loop; `auto`: on a single CPU.",
        free=True,
    ),
    "epochs": Setting(300, whole(1), "Length of the run."),
    "eval_every_epochs": Setting(1, whole(1), "Epochs between evaluations.", free=True),
    "log_every_steps": Setting(100, whole(1), "Steps between log lines.", free=True),
    "health": Setting(
        True, FLAG, "Whether to log what binary layers do, such as the share of flipped signs.", free=True
    ),
    "wandb_project": Setting(
        "", TEXT, "Project of the offline files for Weights & Biases (extra `wandb`); empty: none.", free=True
    ),
    "profile_steps": Setting(
        (),
        PROFILE_STEPS,
        "First step and end of a trace by JAX's profiler, counted in this process; `()`: none.",
        free=True,
    ),
    "mesh.fsdp": Setting(
        1, whole(1), "Devices that share one copy of the parameters and of the optimiser's state.", free=True
    ),
    "data.dataset": Setting("imagenet2012", TEXT, "A TFDS name, `name[/config][:version]`."),
    "data.data_dir": Setting(
        "", TEXT, "The TFDS directory; empty: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.", free=True
    ),
    "data.train_split": Setting(
        "train", TEXT, "The TFDS split to train on, such as `train` or `train[:10%]`."
    ),
    "data.eval_split": Setting("validation", TEXT, "The TFDS split to evaluate on.", free=True),
    "data.crop_scale": Setting(
        (0.08, 1.0), CROP_SCALE, "Range of the share of the image's area that a random crop covers."
    ),
    "data.crop_ratio": Setting((3 / 4, 4 / 3), CROP_RATIO, "Range of width / height of a random crop."),
    "data.crop_interpolation": Setting(
        "bilinear", one_of("bilinear", "bicubic", "random"), "How random crops are resized."
    ),
    "data.flip": Setting(True, FLAG, "Whether half of the training images are mirrored."),
    "data.auto_augment": Setting(
        "",
        TEXT,
        "A policy of timm's RandAugment such as `rand-m9-mstd0.5-inc1`, or of drawings, `draw-m5-mstd2`;"
        " empty: off.",
    ),
    "data.color_jitter": Setting(
        (0.0, 0.0, 0.0, 0.0),
        COLOR_JITTER,
        "Strengths of torchvision's color jitter; 0 leaves a property alone.",
    ),
    "data.repeats": Setting(1, whole(1), "Copies of an image in a batch, augmented differently."),
    "data.eval_resize": Setting(
        0,
        whole(0),
        "Short side in pixels to which evaluation resizes before its centre crop, at least the image size; 0:"
        " as 256 to 224.",
        free=True,
    ),
    "data.eval_interpolation": Setting(
        "bicubic", one_of("bilinear", "bicubic"), "How evaluation resizes.", free=True
    ),
    "data.mean": Setting(IMAGENET_MEAN, MEANS, "Mean of each colour, subtracted from pixels in [0, 1]."),
    "data.std": Setting(IMAGENET_STD, STDS, "Standard deviation of each colour, by which they are divided."),
    "data.max_bad_images": Setting(
        0, whole(0), "Different images per host that may be undecodable before the run stops.", free=True
    ),
    "data.num_workers": Setting(
        -1, whole(-1), "Processes that load images; -1: some if there are many cores, otherwise 0.", free=True
    ),
    "data.num_threads": Setting(
        0, whole(0), "Threads per process that load images; 0: as many as suit the cores.", free=True
    ),
    "data.prefetch": Setting(16, whole(0), "Decoded images waiting per thread.", free=True),
    "erase.prob": Setting(0.0, FRACTION, "Probability that a box of an image is erased; 0: off."),
    "erase.mode": Setting(
        "pixel",
        one_of("pixel", "rand", "const"),
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
        one_of("batch", "pair", "elem"),
        "Whether to draw once per batch, per pair of images or per image.",
    ),
    "mix.correct_lam": Setting(
        True, FLAG, "Whether the labels' share is the area of the box inside the image."
    ),
    "optim.learning_rate": Setting(5e-4, POSITIVE, "Peak of the schedule for `lr_scale_batch` images."),
    "optim.lr_scale_batch": Setting(
        512, whole(1), "Batch size of that peak, which scales linearly with `batch_size`."
    ),
    "optim.schedule": Setting(
        "cosine",
        one_of("cosine", "cosine_by_epoch"),
        "A cosine over the run that changes every step or every epoch.",
    ),
    "optim.min_learning_rate": Setting(1e-5, NOT_NEGATIVE, "End of the schedule."),
    "optim.warmup_epochs": Setting(0, whole(0), "Length of the linear warm-up; 0: none."),
    "optim.warmup_learning_rate": Setting(1e-6, NOT_NEGATIVE, "Start of the warm-up."),
    "optim.weight_decay": Setting(
        0.0, NOT_NEGATIVE, "Decoupled weight decay, of arrays of two or more dimensions."
    ),
    "optim.b1": Setting(0.9, BELOW_ONE, "Decay of Adam's first moment."),
    "optim.b2": Setting(0.999, BELOW_ONE, "Decay of Adam's second moment."),
    "optim.eps": Setting(1e-8, POSITIVE, "Adam's epsilon."),
    "optim.clip_grad_norm": Setting(0.0, NOT_NEGATIVE, "Largest norm of all gradients together; 0: off."),
    "optim.rules": Setting((), RULES, "For parameters whose path matches; the first match counts."),
    "ema.decay": Setting(0.0, DECAY, "Share of the old average in the new one; 0: off."),
    "loss.distillation_weight": Setting(
        1.0,
        FRACTION,
        "Weight of the teacher's term; the labels have what is left. 0: no teacher, except for ranking.",
    ),
    "loss.teacher_targets": Setting(
        "soft",
        one_of("soft", "hard"),
        "Targets are the teacher's probabilities (`soft`) or its preferred class (`hard`).",
    ),
    "loss.label_smoothing": Setting(0.1, FRACTION, "Share of a target that goes to all classes equally."),
    "loss.ranking_weight": Setting(
        0.0, NOT_NEGATIVE, "Weight of the loss that compares attention with the teacher's; 0: off."
    ),
    "loss.ranking_kind": Setting(
        "pairs",
        one_of("pairs", "correlation", "listwise"),
        "Compares `pairs` of keys, the `correlation` of scores, or shares of the first keys (`listwise`).",
    ),
    "loss.ranking_margin": Setting(
        0.1, POSITIVE, "Margin between a pair of keys, in units of the mean attention probability."
    ),
    "loss.ranking_top": Setting(8, whole(2), "Keys that are compared listwise, the teacher's first."),
    "loss.ranking_layers": Setting((), BLOCKS, "Blocks that are ranked, in execution order; `()`: all."),
    "loss.ranking_every": Setting(2, whole(1), "One of this many images is ranked."),
    "loss.regularization_weight": Setting(
        0.0,
        FRACTION,
        "Weight of the term that draws the latent weights of binary blocks to ±1; the labels have what it and"
        " the teacher's term leave.",
    ),
    "loss.regularization_start": Setting(
        0.0, BELOW_ONE, "Share of the run before that term counts; 0: it always does."
    ),
    "init.path": Setting(
        "", TEXT, "A workdir, or anything that `python -m bvit_jax.convert` reads; empty: random.", free=True
    ),
    "init.adapt": Setting(
        False, FLAG, "Whether those weights may be for another image size or other classes.", free=True
    ),
    "teacher.path": Setting(
        "", TEXT, "Anything that `python -m bvit_jax.convert` reads, such as a `.pth`.", free=True
    ),
    "checkpoint.every_steps": Setting(0, whole(0), "Steps between checkpoints; 0: an epoch.", free=True),
    "checkpoint.keep": Setting(2, whole(1), "Checkpoints kept, in addition to the best.", free=True),
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


def validate(config: ConfigDict, *, allow_borders: bool = False) -> None:
    """Raises `UserError` naming the first setting whose value is not allowed or conflicts with another.

    Settings of the model, and what is inside ``optim.rules`` and ``data.auto_augment``, are checked by the
    packages that read them. ``allow_borders`` accepts what `black_borders` finds.
    """
    for section in SECTIONS:
        check_section(section, config[section] if section else config)
    if not allow_borders and (problem := black_borders(config)):
        raise UserError(problem)
    _check_mixing(config)
    _check_ranking(config)
    _check_regularization(config)
    if "name" not in config.model:
        raise UserError("config.model has no name; build it with bvit_jax.models.model_config")


def eval_resize(data: ConfigDict, image_size: int) -> int:
    """Returns the short side in pixels to which evaluation resizes, by default as 256 to 224."""
    return data.eval_resize or image_size * 256 // 224


def black_borders(config: ConfigDict) -> str:
    """Returns what is wrong where evaluation would add black borders, as older versions did, else ""."""
    size, resize = config.model.get("image_size", 0), config.data.eval_resize
    if not isinstance(size, int) or not 0 < resize < size:
        return ""
    return (
        f"config.data.eval_resize is {resize}; expected at least config.model.image_size, {size}, since"
        " what is missing would be black; 0 follows the image size"
    )


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


def _check_regularization(config: ConfigDict) -> None:
    weight, distillation = config.loss.regularization_weight, config.loss.distillation_weight
    if weight + distillation > 1 + 1e-9:
        raise UserError(
            f"config.loss.regularization_weight is {weight} and config.loss.distillation_weight"
            f" {distillation}; expected at most 1 together, since the labels have the rest"
        )
    if config.loss.regularization_start and not weight:
        raise UserError(
            f"config.loss.regularization_start is {config.loss.regularization_start} and"
            " config.loss.regularization_weight 0; raise the weight, or leave out the start"
        )
    if weight and "name" in config.model and "weight_bits" not in config.model:
        raise UserError(
            f"config.loss.regularization_weight is {weight}, and {config.model.name} has no binary weights;"
            " set it to 0"
        )
