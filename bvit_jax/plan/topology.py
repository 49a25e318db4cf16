"""Chips that this machine need not have: libtpu's real compiler for TPUs, and for GPUs `gpus`."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from bvit_jax.errors import UserError, nearest
from bvit_jax.plan import gpus
from bvit_jax.runtime import process
from bvit_jax.runtime.chips import GIB, Chip, chip_named

# In place of asking the metadata server of a TPU machine; and the log of libtpu is not the user's.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    # Nothing here touches a chip, so that a running program, or another compilation, does not matter.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


@dataclass(frozen=True)
class _Family:
    """The slices that exist for a chip: usual shapes, the largest pod, and libtpu's options."""

    shapes: tuple[str, ...]
    max_chips: int
    options: dict[str, Any]


_MEGACORE = {"chip_config_name": "megacore"}  # both cores of a chip are one device
FAMILIES = {
    "v4": _Family(CUBE, 4096, _MEGACORE),
    "v5e": _Family(PLANE, 256, {}),
    "v5p": _Family(CUBE, 8960, _MEGACORE),
    "v6e": _Family(PLANE, 256, {}),
}


@dataclass(frozen=True)
class Topology:
    """Chips that programs can be compiled for.

    Attributes:
      name: such as "v5e:4x4".
      chip: what is published of one chip.
      devices: one per chip, for a mesh; nothing can run on them.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]


def open_topology(name: str) -> Topology:
    """Returns the topology of a name such as "v5e:4x4", or of GPUs such as "h100".

    In a process of ours, call `process.stay_on_cpu` before JAX is used: nothing runs on a chip here. libtpu
    reads `ENVIRONMENT` when it is loaded; elsewhere these variables are taken back afterwards.

    Raises:
      UserError: the name has the wrong form, there is no such chip or shape, or libtpu is missing or
        cannot be loaded.
    """
    if (cards := gpus.parse(name)) is not None:
        chip, count = cards
        return Topology(f"{chip.name.lower()}:{count}", chip, gpus.open_gpus(chip, count))
    kind, shape = parse(name)
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler, the package libtpu, which runs without a TPU;"
            ' install it with: pip install "jax[tpu]"'
        )
    from jax.experimental import topologies

    options = dict(FAMILIES[kind].options)
    if prod(shape) == 1:
        options["chips_per_host_bounds"] = (1,) * 3
    text = "x".join(map(str, shape))
    try:
        with process.environment(ENVIRONMENT):
            found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{text}", **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise _user_error(name, kind, error) from error
    finally:
        process.raise_at_signals()  # libtpu makes its process ignore SIGHUP
    known = chip_named(kind)
    assert known is not None  # every family is in the table
    return Topology(f"{kind}:{text}", known, found.devices)


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns chip and shape of a name such as "v5e:4x4".

    Raises:
      UserError: the form is wrong, or the chip or the number of dimensions or chips is.
    """
    match = re.fullmatch(r"([A-Za-z]\w*):(\d+(?:x\d+)*)", name.strip())
    if match is None:
        raise UserError(f"--topology is {name!r}; expected CHIP:SHAPE, such as v5e:4x4 or v4:2x2x2, or h100")
    kind = match[1].lower()
    if kind not in FAMILIES:
        known = nearest(kind, (*FAMILIES, *gpus.GPUS))
        raise UserError(f"--topology is {name!r}, in which the chip {match[1]!r} is unknown{known}")
    family = FAMILIES[kind]
    shape = tuple(int(size) for size in match[2].split("x"))
    expected = len(family.shapes[0].split("x"))
    if len(shape) != expected or not all(shape):
        raise UserError(f"--topology is {name!r}; {kind} has {expected} dimensions{_shapes(kind, shape)}")
    if prod(shape) > family.max_chips:
        raise UserError(
            f"--topology is {name!r}, {prod(shape)} chips; a pod of {kind} has {family.max_chips}"
            f"{_shapes(kind, shape)}"
        )
    return kind, shape


def _shapes(kind: str, shape: tuple[int, ...]) -> str:
    """Names the usual shapes whose number of chips is closest."""
    chips = prod(shape)
    shapes = sorted(FAMILIES[kind].shapes, key=lambda text: abs(prod(map(int, text.split("x"))) - chips))
    return "; try " + " or ".join(f"{kind}:{text}" for text in shapes[:2])


def _user_error(name: str, kind: str, error: Exception) -> UserError:
    message = str(error)
    if "lockfile" in message:
        return UserError(
            f"--topology={name}: libtpu is locked by another process; wait for it, or set"
            " ALLOW_MULTIPLE_LIBTPU_LOAD=1, or remove /tmp/libtpu_lockfile if no process holds it"
        )
    if "INVALID_ARGUMENT" in message or "divisible" in message:
        return UserError(
            f"--topology is {name!r}, of which libtpu knows no such slice{_shapes(kind, parse(name)[1])}"
        )
    first = message.splitlines()[0] if message else type(error).__name__
    return UserError(
        f"--topology={name}: libtpu cannot be loaded ({first}); install the one that fits jax"
        f' {jax.__version__} with: pip install "jax[tpu]=={jax.__version__}"'
    )


class DoesNotFit(Exception):
    """A program needs more memory than a chip has.

    Attributes:
      needed: bytes, 0 if the compiler does not say.
      available: bytes, likewise.
    """

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"{needed / GIB:.2f} GiB needed, {available / GIB:.2f} GiB available")
        self.needed, self.available = needed, available


def compile_step(lowered: Any) -> Any:
    """Compiles a lowered program.

    Raises:
      DoesNotFit: it needs more memory than the chip has.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(*needed_and_available(str(error))) from error


def needed_and_available(message: str) -> tuple[int, int]:
    """Returns the bytes that are needed and available, from the TPU compiler's message.

    Of messages such as "... temporaries (320.00G) exceeds available HBM (15.75G)" and "Used 20.10G of
    15.75G hbm."; 0 and 0 of others.
    """
    size = r"\(?([\d.]+)([KMGT]?)\)?"
    for pattern in (rf"Used {size} of {size} hbm", rf"{size} exceeds available HBM {size}"):
        match = re.search(pattern, message)
        if match:
            needed, there = (float(match[i]) * 1024 ** " KMGT".index(match[i + 1] or " ") for i in (1, 3))
            return int(needed), int(there)
    return 0, 0
