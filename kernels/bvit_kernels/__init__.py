"""Compiled operations for the inference engine of bvit_jax: products of signs that count bits.

Importing the package compares products with numpy's and registers the operations with JAX, as targets of
`jax.ffi.ffi_call` on CPUs. It raises ImportError if the products differ.
"""

import os

import jax
import numpy as np

from bvit_kernels import _native

ENVIRONMENT = "BVIT_KERNELS"  # a vector unit, in place of the best one of this CPU


def vector_unit() -> str:
    """Returns which code runs: "avx512", "avx2", "neon" or "scalar"."""
    return _native.vector_unit()


def vector_units() -> list[str]:
    """Returns what this CPU can run."""
    return list(_native.vector_units())


def choose(name: str) -> None:
    """Sets which code runs, also for programs that are compiled; raises ValueError if the CPU cannot."""
    _native.choose(name)


def check() -> None:
    """Raises ImportError if the code for this CPU counts other products than numpy, zeros among the signs."""
    random = np.random.default_rng(0)
    for rows, inputs, outputs in ((5, 70, 40), (4, 1024, 32)):
        for values in ((-1, 1), (-1, 0, 1)):
            x, kernel = random.choice(values, (rows, inputs)), random.choice(values, (inputs, outputs))
            nonzero = pack(kernel != 0) if 0 in values else np.zeros((0, outputs), np.uint32)
            y = np.empty((rows, outputs), np.float32)
            _native.count(x.astype(np.float32), pack(kernel < 0), nonzero, y)
            if not np.array_equal(y, x @ kernel):
                raise ImportError(f"bvit_kernels: products are wrong with {vector_unit()}")


def pack(bits: np.ndarray) -> np.ndarray:
    """Packs booleans (inputs, outputs) into words, uint32 (ceil(inputs / 32), outputs)."""
    padded = np.pad(bits, ((0, -len(bits) % 32), (0, 0))).reshape(-1, 32, bits.shape[1]).astype(np.uint32)
    places = np.arange(32, dtype=np.uint32)[:, None]
    return np.sum(padded << places, axis=1, dtype=np.uint32)


def _start() -> None:
    name = os.environ.get(ENVIRONMENT)
    if name:
        if name not in vector_units():
            raise ImportError(f"{ENVIRONMENT} is {name!r}; this CPU has {', '.join(vector_units())}")
        choose(name)
    check()


_start()
for _name, _target in _native.targets().items():
    jax.ffi.register_ffi_target(_name, _target, platform="cpu")
