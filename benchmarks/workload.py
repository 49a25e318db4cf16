"""What both sides of the benchmark agree on: the plan, the protocol of a worker, and its timing."""

import ast
import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

from bvit_jax.errors import UserError, nearest

# The model alone in evaluation mode; the step of eval.py; the step of train.py.
Kind = Literal["forward", "evaluation", "training"]
KINDS: tuple[Kind, ...] = ("forward", "evaluation", "training")
OURS = "bvit_jax"
WARMUP_STEPS = 2
LEARNING_RATE = 5e-4  # and no weight decay: the recipe of the binary models

MODELS: dict[str, dict[str, Any]] = {
    "binaryvit": {"name": "binaryvit"},
    "binaryvit_some_fp": {"name": "binaryvit", "some_fp": True},
    "react_deit_small": {
        "name": "react_deit",
        "class_token": True,
        "layer_scale": False,
        "pool_branches": (),
    },
    "deit_small": {"name": "deit", "norm_epsilon": 1e-5},
    "bhvit_small": {"name": "bhvit"},
    "bivit_deit_small": {"name": "bivit_release_deit"},
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
      model: a name of `MODELS`, or None with a config file.
      config: ``FILE[:argument]`` of an experiment, or None with a model's name.
      overrides: settings that replace the model's.
      batch: images per step.
      dtype: compute dtype of the JAX code; None means the config's, or float32.
      reference: checkout of the PyTorch code, if it is measured too.
      compiled: whether the PyTorch model goes through ``torch.compile``.
      kinds: the steps that are measured.
      autocast: whether the PyTorch model runs under AMP where there is a GPU.
      cache: directory for what the JAX code and Inductor compile, or None.
      plain: whether the JAX code leaves out what training and evaluation do on one CPU by default: packed
        signs, equal blocks in a loop, and memory that is reused from step to step.
      cold: whether the steps run in the process that compiled them, not in a new one that finds them in
        the cache, as in every run but the first.
      execution: fields of `bvit_jax.models.Execution` that replace what training and evaluation choose.
    """

    model: str | None
    config: str | None
    overrides: Mapping[str, Any]
    batch: int
    dtype: str | None
    reference: Path | None
    compiled: bool
    kinds: tuple[Kind, ...] = KINDS
    autocast: bool = True
    cache: Path | None = None
    plain: bool = False
    cold: bool = False
    execution: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes.

    Attributes:
      peak: that of the steps, on the device or (on a CPU) of the process.
      of: which of the two.
      setup_peak: of the process before the first step: building the model and compiling.
    """

    peak: int
    of: Literal["device", "process"]
    setup_peak: int = 0


@dataclass(frozen=True)
class Facts:
    """What a side reports once it is built.

    Attributes:
      version: of jax or torch.
      device: kind of the device.
      dtype: of activations and products.
      mode: the rest of how it runs, in words; may be empty.
      settings: complete settings of the model, its name among them.
      parameters: number of learned values.
      devices: that a batch is spread over.
    """

    version: str
    device: str
    dtype: str
    mode: str
    settings: dict[str, Any]
    parameters: int
    devices: int = 1


@dataclass(frozen=True)
class Work:
    """What a model needs; per image where it depends on images.

    Attributes:
      binary_macs: multiply-accumulates of products of two binary operands.
      real_macs: those of all other products.
      elements: of the activations that products read, each once however many read it, and of those that
        they write.
      variable_bytes: parameters and running statistics.
      state_bytes: those, and the state of the optimiser.
    """

    binary_macs: int
    real_macs: int
    elements: int
    variable_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Compilation:
    """What a side reports about compiling its steps; empty where nothing is compiled.

    Attributes:
      compile_seconds: tracing included.
      temporary_bytes: the compiler's count of temporaries, where there is one.
      compiler_flops: the compiler's count of floating-point operations, where there is one. XLA counts
        the body of a loop once, however often it runs.
      compiler_bytes: its count of the bytes of operands and results, likewise.
      accessed_bytes: the same by `bvit_jax.plan.hlo.hbm_bytes`, the body of a loop as often as it runs.
      work: what the model needs by an arithmetic count, where the side counts it.
    """

    compile_seconds: dict[Kind, float] = field(default_factory=dict)
    temporary_bytes: dict[Kind, int] = field(default_factory=dict)
    compiler_flops: dict[Kind, float] = field(default_factory=dict)
    compiler_bytes: dict[Kind, float] = field(default_factory=dict)
    accessed_bytes: dict[Kind, int] = field(default_factory=dict)
    work: Work | None = None


class Side(Protocol):
    """One of the two programs measured; lives in its own process."""

    @property
    def facts(self) -> Facts:
        """What the side reports once it is built."""

    def compile(self) -> Compilation:
        """Compiles the steps; called once, before any step."""

    def step(self, kind: Kind) -> None:
        """Runs one step and waits for its result."""

    def first_step(self, kind: Kind) -> float | None:
        """Compiles and runs a first step; returns its seconds if the program was in the cache."""

    def memory(self) -> Memory:
        """Returns the peak of the steps."""


StartSide = Callable[[Plan, Any], Side]


class Worker:
    """A side in a process of its own, which sleeps until it is asked."""

    def __init__(self, title: str, start: StartSide, plan: Plan, context: Any = None) -> None:
        """Starts the process and waits until its side is built.

        Args:
          title: what to call it in messages.
          start: makes the side, in the process; a module-level function.
          plan: what is measured.
          context: passed to ``start``.

        Raises:
          UserError: the side cannot be built; the message is the side's own.
        """
        self._title = title
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, start, plan, context), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: Facts = self._receive()

    def prepare(self) -> Compilation:
        """Compiles the steps and runs the first ones, which are not measured.

        Raises:
          UserError: they cannot be compiled; the process lives on and can be ended by `finish`.
        """
        self._connection.send("prepare")
        return self._receive()

    def seconds(self, kind: Kind, steps: int) -> float:
        """Returns how long ``steps`` steps took."""
        self._connection.send((kind, steps))
        return self._receive()

    def first_step(self, kind: Kind) -> float | None:
        """Returns `Side.first_step`, of a process that has not compiled this step before."""
        self._connection.send((kind, 0))
        return self._receive()

    def finish(self) -> Memory:
        """Ends the process and returns its peak of memory."""
        self._connection.send(None)
        memory = self._receive()
        self._process.join()
        return memory

    def _receive(self) -> Any:
        try:
            result = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            out_of_memory = "; out of memory?" if code == -9 else ""
            raise UserError(f"the process of {self._title} ended with status {code}{out_of_memory}") from None
        if isinstance(result, UserError):
            raise result
        return result


def _serve(connection: Connection, start: StartSide, plan: Plan, context: Any) -> None:
    """Builds a side, then does what `Worker` asks for until it asks for None."""
    try:
        side = start(plan, context)
    except UserError as error:
        connection.send(error)
        return
    connection.send(side.facts)
    setup_peak = 0
    with contextlib.suppress(EOFError):  # the other side failed, and the command ended
        while request := connection.recv():
            try:
                if request == "prepare":
                    answer, setup_peak = prepare(side, plan.kinds)
                else:
                    answer = seconds_of(side, *request)
            except UserError as error:
                answer = error
            connection.send(answer)
        connection.send(dataclasses.replace(side.memory(), setup_peak=setup_peak))


def seconds_of(side: Side, kind: Kind, steps: int) -> float | None:
    """Returns how long steps took; with 0 steps, that of `Side.first_step`."""
    if not steps:
        return side.first_step(kind)
    began = time.perf_counter()
    for _ in range(steps):
        side.step(kind)
    return time.perf_counter() - began


def prepare(side: Side, kinds: Iterable[Kind]) -> tuple[Any, int]:
    """Compiles and warms a side; returns what it reports and the peak of memory before the steps."""
    compilation = side.compile()
    setup_peak = process_memory().peak
    forget_setup()
    for kind in kinds:
        for _ in range(WARMUP_STEPS):
            side.step(kind)
    return compilation, setup_peak


def process_memory() -> Memory:
    """Returns the peak of this process's resident memory, since its start or `forget_setup`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(peak if sys.platform == "darwin" else peak * 1024, "process")


def forget_setup() -> None:
    """On Linux, gives freed memory back and resets the peak of the process.

    A compiler leaves gigabytes of freed memory with the process, which would count as the steps'.
    Elsewhere this does nothing, and the peak of the steps includes the setup.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def is_ours(side: str) -> bool:
    """Returns whether a side, by its name, is this project's code."""
    return side.split()[0] == OURS


def known_model(name: str) -> dict[str, Any]:
    """Returns the settings of a model of `MODELS`.

    Raises:
      UserError: there is none of that name.
    """
    if name not in MODELS:
        raise UserError(f"--model is {name!r}" + nearest(name, MODELS))
    return dict(MODELS[name])


def parse_override(text: str) -> tuple[str, Any]:
    """Returns key and value of ``key=value``; what is no Python literal is a string.

    Raises:
      UserError: there is no key or no ``=``.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"--set is {text!r}; expected KEY=VALUE, as in --set image_size=32")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
