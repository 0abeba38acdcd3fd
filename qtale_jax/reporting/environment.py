"""What a report was made with: the command, package versions, hardware."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

PACKAGES = ("qtale-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "qwix", "grain", "transformers", "numpy")


def command_line() -> str:
    """The command that runs this process, as it would be typed."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    if specification is None:
        return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return shlex.join(["python", "-m", specification.name.removesuffix(".__main__"), *sys.argv[1:]])


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _field(path: Path, key: str) -> str | None:
    """The value of the first `key: value` line of a file of the kernel; none where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _accelerators() -> str | None:
    cards = [_field(path, "Model") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    names = [card for card in cards if card]
    if names:
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return os.environ.get("TPU_ACCELERATOR_TYPE")


def _cores() -> int:
    """Cores that this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """Versions and hardware of this machine. JAX is not imported: a report must not take an accelerator."""
    processor = _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown"
    found = {
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "Packages": _versions(),
        "Processor": f"{processor}, {_cores()} cores",
    }
    kilobytes = (_field(Path("/proc/meminfo"), "MemTotal") or "").removesuffix(" kB")
    if kilobytes.isdigit():
        found["Memory"] = f"{int(kilobytes) / 1024**2:.0f} GiB"
    accelerators = _accelerators()
    if accelerators:
        found["Accelerators"] = accelerators
    return found
