"""The sides of `inference`: packed and float models of bvit_jax, the PyTorch code, and real-valued DeiT-S.

Jax and torch are imported only where they are used, by a process whose cores and vector unit are set already.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.workload import Compilation, Facts, Kind, Memory, Plan, Side, process_memory
from bvit_jax.errors import UserError

COMPILED, XLA, FLOAT = "compiled", "xla", "float"
REFERENCE, REFERENCE_COMPILED, DEIT, DEIT_INT8 = "reference", "reference-compiled", "deit", "deit-int8"
OURS = (COMPILED, XLA, FLOAT)
SIDES = {
    COMPILED: "packed, compiled operations",
    XLA: "packed, XLA's operations",
    FLOAT: "the same in float32, JAX",
    REFERENCE: "BinaryViT (PyTorch), eager",
    REFERENCE_COMPILED: "BinaryViT (PyTorch), torch.compile",
    DEIT: "DeiT-S (PyTorch), float32",
    DEIT_INT8: "DeiT-S (PyTorch), int8 linear layers",
}
AT_ONCE = dict.fromkeys(OURS, 2)  # images, the best of 1, 2 and 8 for each side at batch 8 with two threads
ISA = {
    "avx2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "BVIT_KERNELS": "avx2",
    }
}


@dataclass(frozen=True)
class Subject:
    """What a process of a side needs to know.

    Attributes:
      side: a key of `SIDES`.
      settings: of the binary model, its name among them.
      deit: those of transformers' DeiT.
      models: directory with the models ``packed`` and ``float``.
      reference: checkout of the PyTorch code, if it is measured.
      threads: how many cores it may use.
      at_once: images that go through a JAX model together; 0: those of `AT_ONCE`.
    """

    side: str
    settings: Mapping[str, Any]
    deit: Mapping[str, Any]
    models: Path
    reference: Path | None
    threads: int
    at_once: int = 0


def place(subject: Subject) -> None:
    """Confines this process to its cores; before jax or torch is imported, which count them."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: subject.threads])


@contextlib.contextmanager
def on_cpu(isa: str | None) -> Iterator[None]:
    """Keeps processes that are started in the block from accelerators, and caps their vector unit.

    Where a plug-in for an accelerator is installed, JAX takes time and memory to look for one.
    """
    before, variables = dict(os.environ), {"JAX_PLATFORMS": "cpu", **(ISA[isa] if isa else {})}
    for name in variables.keys() & {"XLA_FLAGS"} & os.environ.keys():
        variables[name] += f" {os.environ[name]}"
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def vector_units() -> dict[str, str]:
    """Returns the vector units that the code of installed packages uses."""
    units = {}
    with contextlib.suppress(ImportError):
        import bvit_kernels

        units["bvit_kernels"] = bvit_kernels.vector_unit()
    with contextlib.suppress(ImportError):
        import torch

        units["torch"] = torch.backends.cpu.get_cpu_capability()
    return units


def ceilings(subject: Subject, scale: float, rounds: int) -> dict[str, list[float]]:
    """Returns the binary operations per second of products of packed signs, by who counts, of each round."""
    place(subject)
    import jax
    import jax.numpy as jnp

    from benchmarks import ceilings as of_machine
    from bvit_jax.inference.engine import compiled
    from bvit_jax.inference.engine.operations import Product

    rows, words, columns = of_machine.default_sizes("cpu", scale).binary
    found = {"XLA": of_machine.binary_product(rows, words, columns, rounds)}
    if compiled.available():
        inputs = words * of_machine.WORD_BITS
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (1, rows, inputs))
        negative = jax.random.bits(keys[1], (words, columns), jnp.uint32)
        product = Product(jnp.zeros(inputs), negative, negative[:0])
        count = jax.jit(lambda x: compiled.COMPILED.count(x, product))
        found[COMPILED] = of_machine.rates(lambda _: count(x), 2 * rows * columns * inputs, rounds)
    return found


def write_models(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Writes a model with random weights, in float and packed; returns what it is.

    Args:
      settings: that replace those of BinaryViT-small.
      directory: gets ``float`` and ``packed``.

    Returns:
      ``settings``, all of them; ``binary_macs``, of one image; ``bytes`` of the packed directory.
    """
    import jax
    import jax.numpy as jnp

    import bvit_jax
    from bvit_jax import models, weights
    from bvit_jax.cost import cost_of
    from bvit_jax.cost.count import BINARY
    from bvit_jax.weights.preprocessing import deit_preprocessing

    config = models.model_config("binaryvit", **settings)
    model: Any = models.create_model(config)
    size = config.image_size
    images = jnp.zeros((1, size, size, 3))
    variables = jax.jit(model.init)(
        jax.random.key(0), images
    )  # compiled without the images, which only give shapes
    names = tuple(map(str, range(config.num_classes)))
    read = weights.Pretrained(config, jax.device_get(variables), deit_preprocessing(size), names)
    weights.save(read, directory / "float", "native")
    bvit_jax.export(read, directory / "packed")
    return {
        "settings": config.to_dict(),
        "binary_macs": cost_of(model, size, training=False).total.macs[BINARY],
        "bytes": sum(file.stat().st_size for file in (directory / "packed").iterdir()),
    }


def load(subject: Subject) -> Any:
    """Returns the `bvit_jax.inference.classifier.Classifier` of one of `OURS`."""
    import bvit_jax
    from bvit_jax.inference.engine import compiled, families, levels

    if subject.side == XLA:
        families.best = lambda: levels.XLA  # as where bvit_kernels is not installed
    elif subject.side == COMPILED and not compiled.available():
        raise UserError("bvit_kernels cannot be imported; install it with pip install ./kernels")
    return bvit_jax.load(subject.models / (FLOAT if subject.side == FLOAT else "packed"))


class JaxSide:
    """A model of bvit_jax with its weights inside the compiled program."""

    def __init__(self, plan: Plan, subject: Subject) -> None:
        import jax
        import numpy as np

        jax.config.update("jax_enable_compilation_cache", False)
        classifier = load(subject)
        model, variables, size = classifier.model, classifier.variables, classifier.config.image_size
        at_once = subject.at_once or AT_ONCE[subject.side]
        group = max(n for n in range(1, min(at_once, plan.batch) + 1) if plan.batch % n == 0)
        generator = np.random.default_rng(0)
        self._images = jax.device_put(generator.normal(size=(plan.batch, size, size, 3)).astype(np.float32))

        def forward(images: Any) -> Any:
            groups = images.reshape(-1, group, *images.shape[1:])
            return jax.lax.map(lambda images: model.apply(variables, images).logits, groups)

        self._jitted, self._compiled = jax.jit(forward), forward
        self.facts = Facts(
            version=jax.__version__,
            device=jax.devices()[0].device_kind,
            dtype="float32",
            mode=f"{group} at once",
            settings=dict(subject.settings),
            parameters=0,
        )

    def compile(self) -> Compilation:
        """Compiles the program, weights inside."""
        began = time.perf_counter()
        self._compiled = self._jitted.lower(self._images).compile()
        return Compilation(compile_seconds={"forward": time.perf_counter() - began})

    def step(self, kind: Kind) -> None:
        """Classifies the batch and waits for the logits."""
        del kind
        self._compiled(self._images).block_until_ready()

    def first_step(self, kind: Kind) -> None:
        """Returns None: `first_answer` measures it."""
        del kind

    def memory(self) -> Memory:
        """Returns the peak of the process."""
        return process_memory()


def torch_model(subject: Subject) -> Any:
    """Returns the PyTorch model of a side, with random weights, ready to be called.

    Raises:
      UserError: the checkout cannot build the model.
    """
    import torch

    torch.set_num_threads(subject.threads)
    torch.manual_seed(0)
    if subject.side in (DEIT, DEIT_INT8):
        from transformers import DeiTConfig, DeiTForImageClassification

        model: Any = DeiTForImageClassification(DeiTConfig(**subject.deit)).eval()
        if subject.side == DEIT_INT8:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of their deprecation
                model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        return model
    from benchmarks import torch_side

    if subject.reference is None:
        raise ValueError("the subject has no reference")
    return torch_side.build(subject.reference.resolve(), subject.settings).eval()


def start(plan: Plan, subject: Subject) -> Side:
    """Builds a side in its process; see `workload.Worker`."""
    place(subject)
    if subject.side in OURS:
        return JaxSide(plan, subject)
    from benchmarks import torch_side

    return torch_side.TorchSide(plan, subject.settings, torch_model(subject))
