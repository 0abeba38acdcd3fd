"""Accelerators as their vendors describe them, and the topologies that they come in.

Sources, dense arithmetic (without sparsity), read in 2026:

- TPU v5e  docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s bf16, 393 TOP/s int8, 16 GB at 819 GB/s, links 400 GB/s
- TPU v5p  docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s bf16, 95 GB at 2765 GB/s, links 1200 GB/s; int8 918 TOP/s
           from Google's announcement of v5p (cloud.google.com/blog, December 2023)
- TPU v6e  docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s bf16, 1836 TOP/s int8, 32 GB at 1600 GB/s, links 800 GB/s
- H100     data sheet, SXM, 80 GB: 989 TFLOP/s bf16, 1979 TOP/s int8, 3.35 TB/s, NVLink 900 GB/s
- H200     data sheet, SXM: as H100, with 141 GB at 4.8 TB/s
- A100     data sheet, SXM, 80 GB: 312 TFLOP/s bf16, 624 TOP/s int8, 2039 GB/s, NVLink 600 GB/s

Links are given there in both directions together; the table has one direction, half of it.
Between nodes of GPUs: one port of the DGX reference systems per GPU, 400 Gbit/s (H100, H200) or 200 Gbit/s (A100).
"""

import math
from dataclasses import dataclass

from qtale_jax.errors import InputError, nearest


@dataclass(frozen=True)
class Device:
    """One accelerator; bytes are decimal, rates are peaks.

    Attributes:
        kind: what it is called in a topology.
        name: what it is called elsewhere.
        memory: bytes of HBM.
        bf16: FLOP/s.
        int8: op/s.
        bandwidth: bytes/s of HBM.
        link: bytes/s to other devices of a node, in one direction, over all links.
        node: devices that `link` reaches; None: all.
        network: bytes/s to devices beyond the node, in one direction.
        shapes: topologies that are sold, ascending; empty: any number of devices up to a node, then whole nodes.
    """

    kind: str
    name: str
    memory: float
    bf16: float
    int8: float
    bandwidth: float
    link: float
    node: int | None = None
    network: float = 0.0
    shapes: tuple[str, ...] = ()

    @property
    def is_tpu(self) -> bool:
        """Whether programs for it are compiled by libtpu."""
        return bool(self.shapes)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

DEVICES = {
    device.kind: device
    for device in (
        Device("v5e", "TPU v5e", 16e9, 197e12, 393e12, 819e9, 200e9, shapes=_FLAT),
        Device("v5p", "TPU v5p", 95e9, 459e12, 918e12, 2765e9, 600e9, shapes=_CUBES),
        Device("v6e", "TPU v6e", 32e9, 918e12, 1836e12, 1600e9, 400e9, shapes=_FLAT),
        Device("h100", "NVIDIA H100 SXM 80 GB", 80e9, 989e12, 1979e12, 3350e9, 450e9, node=8, network=50e9),
        Device("h200", "NVIDIA H200 SXM 141 GB", 141e9, 989e12, 1979e12, 4800e9, 450e9, node=8, network=50e9),
        Device("a100", "NVIDIA A100 SXM 80 GB", 80e9, 312e12, 624e12, 2039e9, 300e9, node=8, network=25e9),
    )
}
"""By kind."""


@dataclass(frozen=True)
class Topology:
    """Several devices of one kind; `shape` is that of a TPU slice, or the number of GPUs."""

    device: Device
    shape: str

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return f"{self.device.kind}:{self.shape}"

    @property
    def count(self) -> int:
        """Number of devices."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def link(self) -> float:
        """Bytes/s from one device to others where collectives are slowest, in one direction."""
        inside = self.device.node is None or self.count <= self.device.node
        return self.device.link if inside else self.device.network


def topology(text: str) -> Topology:
    """Reads `kind:shape`.

    Raises:
        InputError: an unknown kind, or a shape that it does not come in.
    """
    kind, _, shape = text.partition(":")
    where = f"plan.topology={text!r}"
    if kind not in DEVICES:
        raise InputError(
            f"{where}: unknown device kind{nearest(kind, DEVICES)}; allowed: kind:shape with {', '.join(DEVICES)}"
        )
    device = DEVICES[kind]
    if device.is_tpu:
        if shape not in device.shapes:
            raise InputError(f"{where}: {kind} does not come in this shape; allowed: {', '.join(device.shapes)}")
    else:
        count, node = int(shape) if shape.isascii() and shape.isdecimal() else 0, device.node or 1
        if count < 1 or (count > node and count % node):
            raise InputError(f"{where}: allowed: {kind}: and 1 to {node} devices, or a multiple of {node}")
        shape = str(count)
    return Topology(device, shape)


def topologies(device: Device) -> list[Topology]:
    """The topologies of a kind, fewest devices first; of GPUs the powers of two."""
    return [Topology(device, shape) for shape in device.shapes or map(str, _GPUS)]
