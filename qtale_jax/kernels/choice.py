"""What `ModelSpecification.kernels` means on the devices that are here."""

import functools

import jax

from qtale_jax.models.specification import Kernels

LEAST_CAPABILITY = 8.0
"""Compute capability of the first GPUs that Triton serves (Ampere)."""


def runs_gpu_kernels(kernels: Kernels) -> bool:
    """Whether a program that is traced now takes the kernels for GPUs, if it is compiled for one.

    "auto" takes them where they were measured faster and have nothing to go wrong: on one GPU. Over several, XLA would
    gather the parts of a sharded weight for them.
    """
    if kernels not in ("auto", "pallas"):
        return False
    capabilities = _capabilities()
    able = bool(capabilities) and min(capabilities) >= LEAST_CAPABILITY
    return able and (kernels == "pallas" or len(capabilities) == 1)


@functools.cache
def _capabilities() -> tuple[float, ...]:
    """Of all NVIDIA GPUs of all processes."""
    try:
        return tuple(float(device.compute_capability) for device in jax.devices("cuda"))
    except RuntimeError:  # no such devices
        return ()
