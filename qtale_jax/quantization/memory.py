"""How much memory this process holds and has held, and giving back what it no longer needs."""

import ctypes
from pathlib import Path

PAGE = 4096


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return 0


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        # Not getrusage: its maximum survives exec, so a child starts with what its parent held.
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, ValueError, StopIteration):
        return 0


def release_freed() -> None:
    """Asks the C library to give freed memory back to the system; does nothing where it cannot.

    glibc keeps it, scattered over its arenas: a loop that frees all that it allocated still grew by 40 MB with every
    layer of a model of 100 million parameters.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
