"""How the C library's allocator treats the memory that XLA asks for on a CPU."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import platform

import jax

# Of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1  # the largest integer is only 2 GiB, which a large batch exceeds


def keep_freed_memory() -> bool:
    """Keeps freed memory in the process for the next step of a training run, if JAX runs on CPUs only.

    Call it before JAX starts its backend. It helps programs of one device: with several, each has a thread
    that allocates, whose arena is limited to 64 MiB.

    XLA allocates the temporary arrays of a step when it starts and frees them when it ends. glibc hands
    blocks of that size back to the system, which must find and clear each of their pages again in the next
    step; on two cores that took a fifth to a half of a training step. If nothing is handed back, the same
    pages are reused. This holds for the main arena, which belongs to the main thread, so the main thread must
    run the steps: dispatch is made synchronous. One arena for all threads would do the same, but it would be
    full of what compiling left behind, which every allocation of a step then has to search. The process's
    peak is about the same.

    Returns:
      Whether the settings were made: there is no accelerator and the C library is glibc. Otherwise nothing
      is changed.
    """
    if not _only_cpus() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    if not all(mallopt(name, value) == 1 for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


def release() -> None:
    """Returns freed memory to the system if the C library can: compiling leaves gigabytes behind.

    The free blocks are scattered: the arrays of a step would not fit into them, but the system can reuse
    the pages.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _only_cpus() -> bool:
    """Returns whether JAX can find no accelerator, without starting it."""
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
