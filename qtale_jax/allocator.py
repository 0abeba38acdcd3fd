"""What the process does with memory that was freed.

XLA on CPUs allocates the temporary arrays of a program for each call, and frees them after it. glibc returns blocks of
that size to the kernel, which clears every page of them for the next call: a sixth of the time of a training step of
25 to 50 million parameters on two cores.
"""

import ctypes
import importlib.util
import os
import pkgutil
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8
"""Parameters of `mallopt`, from malloc.h."""

STEP = 128 << 20
"""Bytes by which the heap grows at least."""


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks for the next allocation; for processes that compute on CPUs.

    All blocks then come from one heap, which grows only: the process holds the most that it ever had. To be called
    before JAX allocates anything. Nothing is changed where an accelerator may be used, without glibc, or where the
    environment says how to allocate (`MALLOC_...`).

    Returns:
        Whether it does.
    """
    if not _computes_on_cpus() or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    wanted = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: STEP}
    return all([libc.mallopt(parameter, value) for parameter, value in wanted.items()])


def _computes_on_cpus() -> bool:
    """Whether JAX will: it is told to, or no plugin for anything else is installed."""
    told = os.environ.get("JAX_PLATFORMS")
    if told:
        return told == "cpu"
    plugins = importlib.util.find_spec("jax_plugins")
    found = plugins is not None and any(pkgutil.iter_modules(plugins.submodule_search_locations))
    return not found and importlib.util.find_spec("libtpu") is None
