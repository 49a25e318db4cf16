"""How the C library's allocator treats the memory that XLA asks for on a CPU."""

import ctypes
import platform

# Of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keeps freed memory in the process, for the next step of a training run on a CPU.

    XLA allocates the temporary arrays of a step when it starts and frees them when it ends. glibc hands
    blocks of that size back to the system, which must find and clear every page of them again in the next
    step; on two cores that took a third to a half of a training step. Without a way back, and with one
    arena for all threads, the same pages are used again. The process's peak is the same.

    Returns:
      Whether the C library is glibc and took the settings; elsewhere nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(name, value) == 1 for name, value in settings)
