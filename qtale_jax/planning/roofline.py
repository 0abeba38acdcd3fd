"""The least time that a device needs, from what it has to compute, to read and write, and to send."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qtale_jax.planning.devices import Topology


@dataclass(frozen=True)
class Roofline:
    """Work of one device, and the seconds that each part takes at its peak rate; all overlap, so the longest counts.

    Attributes:
        flops: floating-point operations.
        moved: bytes read from and written to its memory.
        sent: bytes sent to other devices.
        arithmetic: seconds.
        memory: seconds.
        interconnect: seconds.
    """

    flops: float
    moved: float
    sent: float
    arithmetic: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """At least this."""
        return max(self.arithmetic, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("arithmetic", "memory", "interconnect"), key=lambda part: getattr(self, part))

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "seconds": self.seconds, "bound": self.bound}


TEMPORARY = ("gradients", "activations", "gathered weights")
"""What a program makes for itself; all else that it needs it is given."""

GAPS = 0.4
"""Bytes that compilers for TPUs set aside beyond the temporary arrays that are there at the same time, a share of them.

An array takes one place for as long as it is there, so those that come and go leave gaps. Programs of training
LLaMA-2-7B and LLaMA-3.1-8B compiled for v5e and v6e have 0.2 to 0.55.
"""


def gaps(memory: Mapping[str, int]) -> int:
    """Bytes of gaps between the temporary arrays of a program for a TPU that needs `memory`."""
    return math.ceil(GAPS * sum(memory.get(name, 0) for name in TEMPORARY))


@dataclass(frozen=True)
class Estimate:
    """What one step takes.

    Attributes:
        memory: bytes per device by what needs them.
        work: of the step, per device.
        tokens: of the step, on all devices.
    """

    memory: dict[str, int]
    work: Roofline
    tokens: int

    @property
    def total(self) -> int:
        """Bytes per device."""
        return sum(self.memory.values())

    @property
    def arguments(self) -> int:
        """Bytes per device of what the step is given."""
        return self.total - self.temporary - self.gaps

    @property
    def temporary(self) -> int:
        """Bytes per device of what it makes and does not return, as much as is there at the same time."""
        return sum(self.memory.get(name, 0) for name in TEMPORARY)

    @property
    def gaps(self) -> int:
        """Bytes per device that are set aside between temporary arrays."""
        return self.memory.get("gaps", 0)

    @property
    def tokens_per_second(self) -> float:
        """At most, over all devices."""
        return self.tokens / self.work.seconds


def roofline(
    topology: Topology, *, flops: float, moved: float, sent: float = 0.0, integer_flops: float = 0.0
) -> Roofline:
    """The roofline of one device: bfloat16 arithmetic, `integer_flops` of it at the rate of int8."""
    device = topology.device
    return Roofline(
        flops=flops,
        moved=moved,
        sent=sent,
        arithmetic=(flops - integer_flops) / device.bf16 + integer_flops / device.int8,
        memory=moved / device.bandwidth,
        interconnect=sent / topology.link,
    )
