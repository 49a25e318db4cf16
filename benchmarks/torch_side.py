"""The steps of the PyTorch code as its ``engine.py`` runs them: github.com/Phuoc-Hoan-Le/BinaryViT.

The model is the checkout's own. What the checkout imports and is not installed (timm, transformers)
is replaced by small stand-ins of what it uses of them.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.workload import LEARNING_RATE, Compilation, Facts, Kind, Memory, Plan, process_memory
from bvit_jax.errors import UserError

# From the name of our model to the class in models.py and the directory in configs/.
SOURCES = {
    "binaryvit": ("PyramidViTForImageClassification", "binaryvit-small-patch4-224"),
    "react_deit": ("ViTForImageClassificationExtraRes", "deit-small-patch16-224"),
    "deit": ("ViTForImageClassification", "deit-small-patch16-224"),
}
RENAMED = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_classes": "num_labels",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "reduction": "reduction_ratio",
    "norm_epsilon": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "drop_path": "drop_path",
    "some_fp": "some_fp",
    "class_token": "enable_cls_token",
    "weight_bits": "weight_bits",
    "act_bits": "input_bits",
}


class TorchSide:
    """Model, AdamW and random data of the reference."""

    def __init__(self, plan: Plan, settings: Mapping[str, Any], model: nn.Module) -> None:
        """Takes the counterpart of our model, of which these are the settings and the name."""
        torch.backends.cudnn.benchmark = True
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = model.to(self._device)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        amp = self._device.type == "cuda" and plan.autocast
        self._autocast = torch.autocast("cuda", torch.float16, enabled=amp)
        self._scaler = torch.amp.GradScaler("cuda", enabled=amp)
        size, classes = settings["image_size"], settings["num_classes"]
        self._images = torch.randn(plan.batch, 3, size, size, device=self._device)
        self._teacher_logits = torch.randn(plan.batch, classes, device=self._device)
        self._labels = torch.randint(0, classes, (plan.batch,), device=self._device)
        self._kinds = plan.kinds
        self._is_compiled = plan.compiled
        if plan.compiled and plan.cache is not None:  # or Inductor finds what an earlier run compiled
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(plan.cache / "inductor")
        self._model: Any = torch.compile(model) if plan.compiled else model
        on_gpu = self._device.type == "cuda"
        modes = ["torch.compile" if plan.compiled else "eager"]
        modes += ["autocast"] if amp else []
        modes += [] if on_gpu else [f"{torch.get_num_threads()} threads"]
        self.facts = Facts(
            version=str(torch.__version__),  # its own class, which would travel as torch
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            dtype="float16" if amp else "float32",
            mode=", ".join(modes),
            settings=dict(settings),
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        )

    def compile(self) -> Compilation:
        """Compiles if asked to: by a first step of each kind, less the time of the second.

        Raises:
          UserError: torch.compile fails, for instance because the machine has no compiler.
        """
        result = Compilation()
        for kind in self._kinds if self._is_compiled else ():
            try:
                first, second = self._timed_step(kind), self._timed_step(kind)
            except Exception as error:  # of whatever class its backends raise
                lines = str(error).strip().splitlines()
                reason = lines[0][:160] if lines else type(error).__name__
                raise UserError(f"torch.compile failed in the {kind} step: {reason}") from error
            result.compile_seconds[kind] = max(0.0, first - second)
        return result

    def first_step(self, kind: Kind) -> None:
        """Returns None: nothing that is compiled is cached for another process."""
        del kind

    def step(self, kind: Kind) -> None:
        """Runs one step and waits for its result."""
        if kind == "training":
            self._train()
        elif kind == "evaluation":
            self._evaluate()
        else:
            self._forward()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> Memory:
        """Returns the peak of the device, or of the process on a CPU."""
        if self._device.type == "cuda":
            return Memory(torch.cuda.max_memory_allocated(), "device")
        return process_memory()

    def _timed_step(self, kind: Kind) -> float:
        began = time.perf_counter()
        self.step(kind)
        return time.perf_counter() - began

    def _train(self) -> None:
        self._model.train()
        with self._autocast:
            logits = self._model(self._images).logits
            loss = _distillation_loss(logits, self._teacher_logits)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def _forward(self) -> torch.Tensor:
        self._model.eval()
        with torch.no_grad(), self._autocast:
            return self._model(self._images).logits

    def _evaluate(self) -> tuple[float, float, float]:
        """Returns loss, top-1 and top-5 of the batch, as ``evaluate`` of ``engine.py`` takes them."""
        logits = self._forward()
        with torch.no_grad(), self._autocast:
            loss = F.cross_entropy(logits, self._labels)
        best = logits.topk(min(5, logits.shape[1])).indices.eq(self._labels[:, None]).float()
        return loss.item(), best[:, :1].sum().item(), best.sum().item()


def start(plan: Plan, settings: Mapping[str, Any]) -> TorchSide:
    """Builds the reference's side for the settings of our model; see `workload.Worker`."""
    torch.manual_seed(0)
    return TorchSide(plan, settings, build(_checkout(plan), settings))


def _checkout(plan: Plan) -> Path:
    if plan.reference is None:
        raise ValueError("the plan has no reference")
    return plan.reference.resolve()


def _distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Returns what ``DistributionLoss`` of the reference does: soft cross-entropy."""
    return -(F.softmax(teacher_logits, 1) * F.log_softmax(logits, 1)).sum(1).mean()


def build(checkout: Path, settings: Mapping[str, Any]) -> nn.Module:
    """Returns the checkout's model with our settings.

    Raises:
      UserError: the checkout cannot be imported or lacks the model.
    """
    class_name, directory = SOURCES[settings["name"]]
    path = checkout / "configs" / directory / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--reference is {checkout}: cannot read {path.name}: {error}") from error
    with _imports_from(checkout):
        try:
            models = importlib.import_module("models")
        except ImportError as error:
            raise UserError(f"--reference is {checkout}: cannot import its models: {error}") from error
        if not hasattr(models, class_name):
            raise UserError(f"--reference is {checkout}: its models.py has no {class_name}")
        config = _config(models, values, settings)
        try:
            return getattr(models, class_name)(config=config)
        except Exception as error:  # code that is not ours: it writes some sizes of 224 as numbers
            raise UserError(f"the reference cannot build this model: {error!r}; check --set") from error


def build_small(checkout: Path, settings: Mapping[str, Any]) -> nn.Module:
    """Returns the checkout's model for another size than 224 pixels or other patches than 4×4.

    A pyramid's patches are 4×4 whatever its configuration says, and its patch embeddings between stages are
    given sides of 56, 28 and 14 tokens. Both are replaced here.
    """
    with _imports_from(checkout):
        pyramid: Any = importlib.import_module("transformer.modeling_vit_extra_res_pyramid")
    names = ("PatchEmbed", "BinaryPatchEmbed", "ViTPatchEmbeddings")
    grid = settings["image_size"] // settings["patch_size"]
    originals = {name: getattr(pyramid, name) for name in names}

    def resized(original: Any) -> Any:
        return lambda side, **options: original(side * grid // 56, **options)

    try:
        for name in names[:2]:
            setattr(pyramid, name, resized(originals[name]))
        pyramid.ViTPatchEmbeddings = partial(_first_patches, originals["ViTPatchEmbeddings"])
        return build(checkout, settings)
    finally:
        for name, original in originals.items():
            setattr(pyramid, name, original)


def _first_patches(original: Any, config: Any) -> nn.Module:
    """Returns the embedding of a pyramid's first patches, of the size that the configuration asks for."""
    embedding: Any = original(config)
    size = config.patch_size
    if embedding.patch_size != (size, size):
        embedding.patch_size, embedding.num_patches = (size, size), (config.image_size // size) ** 2
        embedding.projection = nn.Conv2d(config.num_channels, embedding.projection.out_channels, size, size)
    return embedding


def distillation_loss(checkout: Path) -> nn.Module:
    """Returns the loss of the checkout between logits and a teacher's."""
    with _imports_from(checkout):
        loss: nn.Module = importlib.import_module("losses").DistributionLoss()
    return loss


def timm_optimizer(model: nn.Module, rate: float, last: float, epochs: int) -> tuple[Any, Any]:
    """Returns timm's AdamW and cosine schedule, as the scripts of the reference set them.

    Raises:
      UserError: timm is not installed.
    """
    try:
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler
    except ImportError as error:
        raise UserError(f"optimiser and schedule are timm's: {error}; pip install timm") from error
    optimizer = create_optimizer_v2(model, opt="adamw", lr=rate, weight_decay=0.0)
    return optimizer, CosineLRScheduler(optimizer, t_initial=epochs, lr_min=last)


def _config(models: ModuleType, values: dict[str, Any], settings: Mapping[str, Any]) -> Any:
    """Returns the file's values, in their place those of our settings."""
    config = SimpleNamespace(
        **values,
        chunk_size_feed_forward=0,
        use_return_dict=True,
        output_attentions=False,
        output_hidden_states=False,
    )
    for ours, theirs in RENAMED.items():
        if ours in settings:
            setattr(config, theirs, settings[ours])
    if isinstance(settings["depth"], tuple):
        config.depths = settings["depth"]
        config.num_hidden_layers = sum(settings["depth"])
    branches = settings.get("pool_branches", ())
    if not set(branches) <= {3, 5}:
        raise UserError(f"pool_branches is {branches}; the reference has 3 and 5 only")
    config.avg_res3, config.avg_res5 = 3 in branches, 5 in branches
    config.disable_layerscale = not settings.get("layer_scale", True)
    norm = settings.get("norm", "layer_norm")
    config.norm_layer = models.BatchNormT if norm == "batch_norm" else nn.LayerNorm
    return config


@contextlib.contextmanager
def _imports_from(checkout: Path) -> Iterator[None]:
    """Imports modules from the checkout, with stand-ins for what is missing, and silences it."""
    stand_ins = {"timm.models.layers": _timm, "transformers.modeling_outputs": _transformers}
    for module, make in stand_ins.items():
        try:
            importlib.import_module(module)
        except Exception:  # missing, of a version without it, or not made for this torch
            sys.modules.update(make())
    sys.path.insert(0, str(checkout))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.path.remove(str(checkout))


class DropPath(nn.Module):
    """timm's stochastic depth: drops whole examples of a batch and scales up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x with some examples zero in training."""
        if not self.training or self.rate == 0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = 1 - self.rate
        return x * x.new_empty(shape).bernoulli_(kept).div_(kept)


class Output:
    """A model's output of transformers: names, and the values that are not None by index."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)
        for name in ("hidden_states", "attentions"):
            self.__dict__.setdefault(name, None)

    def __getitem__(self, index: int | slice) -> Any:
        return tuple(value for value in self.__dict__.values() if value is not None)[index]


def _timm() -> dict[str, ModuleType]:
    layers = _module(
        "timm.models.layers",
        trunc_normal_=nn.init.trunc_normal_,
        DropPath=DropPath,
        to_2tuple=lambda x: (x, x),
    )
    models = _module("timm.models", layers=layers)
    return {m.__name__: m for m in (_module("timm", models=models), models, layers)}


def _transformers() -> dict[str, ModuleType]:
    logging = SimpleNamespace(get_logger=lambda name: None)
    names = ("BaseModelOutput", "BaseModelOutputWithPooling", "ImageClassifierOutput")
    modules = (
        _module("transformers", ViTConfig=SimpleNamespace),
        _module("transformers.activations", ACT2FN={"gelu": F.gelu}),
        _module("transformers.modeling_outputs", **dict.fromkeys(names, Output)),
        _module("transformers.utils", logging=logging),
    )
    return {m.__name__: m for m in modules}


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    return module
