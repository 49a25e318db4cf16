"""Directories of Hugging Face's ViT, DeiT and Swin: ``config.json`` and ``model.safetensors``.

Source: ``models/{vit,deit,swin}`` of github.com/huggingface/transformers.
"""

from collections.abc import Mapping
from typing import Any

from bvit_jax.errors import UserError
from bvit_jax.weights.formats.base import (
    ASSUMED_PREPROCESSING,
    Config,
    Format,
    Interpretation,
    check_epsilon,
)
from bvit_jax.weights.formats.reference import MODEL_TYPES, labels_of
from bvit_jax.weights.naming import (
    HUGGING_FACE_DEIT,
    HUGGING_FACE_DEIT_HEADS,
    HUGGING_FACE_SWIN,
    HUGGING_FACE_VIT,
    Naming,
)
from bvit_jax.weights.preprocessing import Preprocessing, deit_preprocessing
from bvit_jax.weights.raw_checkpoint import PROCESSOR_FILE, RawCheckpoint

NAME = "huggingface"
MODELS = ("deit", "swin")

_SHARED_KEYS = {  # of config.json -> of ours
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_epsilon",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_VIT_KEYS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
}
_SWIN_KEYS = {
    "embed_dim": "width",
    "depths": "depth",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "drop_path_rate": "drop_path",
}
_FIXED = {  # the only values that our models support
    "hidden_act": "gelu",
    "qkv_bias": True,
    "num_channels": 3,
    "use_absolute_embeddings": False,
}
SWIN_NORM_EPSILON = 1e-5  # transformers uses layer_norm_eps in some of Swin's norms only
_PIL_FILTERS = {2: "bilinear", 3: "bicubic"}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_PROCESSOR_DEFAULTS: dict[str, dict[str, Any]] = {  # of the processors, for what their files leave out
    "ViT": {"size": 224, "resample": 2, **_HALF},
    "DeiT": {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3, **_HALF},
}


def naming(config: Config) -> Naming:
    """Returns the names of the arrays of a model of `MODELS`."""
    if config["name"] == "swin":
        return HUGGING_FACE_SWIN
    if config["distillation_head"]:
        return HUGGING_FACE_DEIT_HEADS
    return HUGGING_FACE_DEIT if config["distillation_token"] else HUGGING_FACE_VIT


def recognise(raw: RawCheckpoint) -> bool:
    """Returns whether the files are a transformers classifier and its configuration."""
    names = ("vit.layernorm.weight", "deit.layernorm.weight", "swin.layernorm.weight")
    known = any(name in raw.state for name in names)
    binary = any(name.endswith(".moveq") for name in raw.state)
    reference = isinstance(raw.values.get("hidden_size"), list) or raw.args.get("model_type") in MODEL_TYPES
    return known and "model_type" in raw.values and not binary and not reference


def interpret(raw: RawCheckpoint) -> Interpretation:
    """Finds the model that ``config.json`` describes."""
    values = raw.values
    kind = values.get("model_type")
    if kind not in ("vit", "deit", "swin"):
        raise UserError(f"{raw.origin}: model_type is {kind!r}; expected vit, deit or swin")
    for key, expected in _FIXED.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{raw.origin}: {key} is {values[key]!r}; only {expected!r} is supported")
    keys = _SHARED_KEYS | (_SWIN_KEYS if kind == "swin" else _VIT_KEYS)
    settings = {ours: values[theirs] for theirs, ours in keys.items() if theirs in values}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if absent := sorted(keys.keys() - values.keys() - {"drop_path_rate", *_dropouts()}):
        raise UserError(f"{raw.origin}: its config.json has no {', '.join(absent)}")
    if kind == "swin":
        settings["mlp_ratio"] = _whole(values.get("mlp_ratio", 4), raw.origin)
        if settings["norm_epsilon"] != SWIN_NORM_EPSILON:
            raise UserError(
                f"{raw.origin}: layer_norm_eps is {settings['norm_epsilon']}, which transformers uses"
                f" for some norms of Swin only; expected {SWIN_NORM_EPSILON}"
            )
    two_heads = "cls_classifier.weight" in raw.state
    classifier = "cls_classifier.weight" if two_heads else "classifier.weight"
    settings["num_classes"] = raw.shape(classifier)[0]
    if kind != "swin":
        settings["distillation_token"] = kind == "deit"
        settings["distillation_head"] = two_heads
    model = "swin" if kind == "swin" else "deit"
    return Interpretation(
        model,
        settings,
        _preprocessing(raw, settings["image_size"]),
        labels_of(values, settings["num_classes"]),
        () if raw.processor else (ASSUMED_PREPROCESSING,),
    )


def describe(config: Config, class_names: tuple[str, ...], _: Preprocessing) -> dict[str, Any]:
    """Returns the ``config.json`` of a model of `MODELS`."""
    swin = config["name"] == "swin"
    keys = _SHARED_KEYS | (_SWIN_KEYS if swin else _VIT_KEYS)
    values = {theirs: config[ours] for theirs, ours in keys.items()}
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    if swin:
        kind, architecture = "swin", "SwinForImageClassification"
        stages = len(config["depth"])
        # transformers derives these and writes them nevertheless.
        values |= {
            "mlp_ratio": float(config["mlp_ratio"]),
            "hidden_size": config["width"] * 2 ** (stages - 1),
            "num_layers": stages,
            "use_absolute_embeddings": False,
            "encoder_stride": config["patch_size"] * 2 ** (stages - 1),
        }
    elif config["distillation_token"]:
        kind = "deit"
        teacher = "WithTeacher" if config["distillation_head"] else ""
        architecture = f"DeiTForImageClassification{teacher}"
    else:
        kind, architecture = "vit", "ViTForImageClassification"
    return {
        "architectures": [architecture],
        "model_type": kind,
        **values,
        "hidden_act": "gelu",
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "label2id": {name: i for i, name in enumerate(class_names)},
    }


def describe_processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Returns the ``preprocessor_config.json`` of the preprocessing."""
    p = preprocessing
    resize = {"height": p.resize, "width": p.resize} if p.square else {"shortest_edge": p.resize}
    crop = p.resize != p.crop or not p.square
    return {
        # ViT's processor does not crop, and DeiT's does not resize by the short side: Bit's does both.
        "image_processor_type": "DeiTImageProcessor" if p.square else "BitImageProcessor",
        "do_resize": True,
        "size": resize,
        "resample": next(number for number, name in _PIL_FILTERS.items() if name == p.interpolation),
        "do_center_crop": crop,
        "crop_size": {"height": p.crop, "width": p.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
        "do_convert_rgb": True,
    }


def check(config: Config) -> None:
    """Raises `UserError` if transformers cannot compute this model of `MODELS`."""
    if config["name"] == "swin":
        check_epsilon("transformers' Swin", SWIN_NORM_EPSILON, config)


def _preprocessing(raw: RawCheckpoint, image_size: int) -> Preprocessing:
    if not raw.processor:
        return deit_preprocessing(image_size)
    kind = str(raw.processor.get("image_processor_type", raw.processor.get("feature_extractor_type")))
    p = {**_PROCESSOR_DEFAULTS.get(kind.split("Image")[0].split("Feature")[0], {}), **raw.processor}
    try:
        resize, square = _resize(p)
        crop = _side(p["crop_size"]) if p.get("do_center_crop") else resize
        usual = all(p.get(key, True) is True for key in ("do_resize", "do_rescale", "do_normalize"))
        if not usual or abs(p.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9 or crop != image_size:
            raise ValueError(f"it does not end in normalised images of {image_size} pixels")
        mean, std = tuple(map(float, p["image_mean"])), tuple(map(float, p["image_std"]))
        return Preprocessing(resize, crop, _PIL_FILTERS[p.get("resample", 2)], mean, std, square)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{raw.origin}: its {PROCESSOR_FILE} is not understood: {error!r}; correct or delete it"
            " (without it, images are prepared as for DeiT)"
        ) from error


def _resize(processor: Mapping[str, Any]) -> tuple[int, bool]:
    """Returns the length to resize to, and whether it applies to both sides."""
    size = processor["size"]
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"]), False
    return _side(size), True


def _side(size: Any) -> int:
    if isinstance(size, Mapping):
        if size["height"] != size["width"]:
            raise ValueError(f"its size {dict(size)} is not square")
        return int(size["height"])
    return int(size)


def _dropouts() -> set[str]:
    return {theirs for theirs, ours in _SHARED_KEYS.items() if ours.endswith("dropout")}


def _whole(value: float, origin: str) -> int:
    if int(value) != value:
        raise UserError(f"{origin}: mlp_ratio is {value}; only whole ratios are supported")
    return int(value)


FORMAT = Format(
    name=NAME,
    models=MODELS,
    check=check,
    naming=naming,
    recognise=recognise,
    interpret=interpret,
    describe=describe,
    processor=describe_processor,
)
