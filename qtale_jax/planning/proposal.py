"""The smallest topology on which training fits, and the largest microbatch."""

from dataclasses import dataclass

from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.parallel.axes import AXES
from qtale_jax.parallel.mesh import mesh_sizes
from qtale_jax.planning.devices import Topology, topologies
from qtale_jax.planning.subject import check_divides
from qtale_jax.planning.traffic import Sizes
from qtale_jax.planning.training import TrainingPlanner

MOST_ROWS = 4096
"""Rows per device that are tried at most."""


@dataclass(frozen=True)
class Proposal:
    """A topology on which training fits.

    Attributes:
        topology: its name.
        mesh: sizes of the axes data, fsdp, tensor.
        rows: of a microbatch on each device, the largest power of two that fits.
        microbatches: `train.microbatches` for the configured batch in the largest parts that fit; None: the batch is
            not a multiple of the devices that share it.
        bytes: per device with the configured batch in those parts, or with `rows`.
    """

    topology: str
    mesh: Sizes
    rows: int
    microbatches: int | None
    bytes: int


def usable_bytes(config: Config, topology: Topology) -> float:
    """Bytes of a device's memory that arrays may take."""
    return config.plan.usable * topology.device.memory


def fits(planner: TrainingPlanner, topology: Topology, sizes: Sizes, rows: int, microbatches: int) -> bool:
    """Whether a microbatch of `rows` on each device fits."""
    return sum(planner.memory(sizes, rows, microbatches).values()) <= usable_bytes(planner.config, topology)


def largest_rows(planner: TrainingPlanner, topology: Topology, sizes: Sizes) -> int:
    """The largest power of two of rows per device that fits; 0: not even one does."""
    rows = 1
    while rows <= MOST_ROWS and fits(planner, topology, sizes, rows, 1):
        rows *= 2
    return rows // 2


def propose(planner: TrainingPlanner, topology: Topology) -> Proposal | None:
    """What fits on a topology with the configured mesh; None: nothing, or the mesh does not go with it."""
    config = planner.config
    try:
        sizes = mesh_sizes(config.mesh, topology.count)
        check_divides(planner.spec, dict(zip(AXES, sizes, strict=True)), config.data.length)
    except InputError:
        return None
    rows = largest_rows(planner, topology, sizes)
    if not rows:
        return None
    mine, rest = divmod(config.train.batch_size, sizes[0] * sizes[1])
    counts = [] if rest else [count for count in range(1, mine + 1) if mine % count == 0]
    parts = next((count for count in counts if fits(planner, topology, sizes, mine // count, count)), None)
    held = planner.memory(sizes, rows if parts is None else mine // parts, parts or 1)
    return Proposal(topology.name, sizes, rows, parts, sum(held.values()))


def smallest(planner: TrainingPlanner, topology: Topology) -> Proposal | None:
    """The first topology of the same kind of device that takes the configured batch; None: none does."""
    for candidate in topologies(topology.device):
        found = propose(planner, candidate)
        if found is not None and found.microbatches is not None:
            return found
    return None
