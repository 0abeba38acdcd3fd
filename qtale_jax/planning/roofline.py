"""The least time that a device needs, from what it has to compute, to read and write, and to send."""

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
        return self.total - self.temporary

    @property
    def temporary(self) -> int:
        """Bytes per device of what it makes and does not return."""
        return sum(self.memory.get(name, 0) for name in TEMPORARY)

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
