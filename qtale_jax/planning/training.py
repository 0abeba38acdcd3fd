"""What a training step takes on every device of a mesh: memory, arithmetic, time."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qtale_jax.config.schema import Config
from qtale_jax.models.cost import training_flops_per_token
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.mesh import abstract_mesh
from qtale_jax.planning.devices import Topology, topology
from qtale_jax.planning.roofline import Estimate, gaps, roofline
from qtale_jax.planning.state import repeated_bytes, state_shards, total_bytes, trained_part
from qtale_jax.planning.step import Activations, StepShapes, batch_shapes
from qtale_jax.planning.tiles import padding
from qtale_jax.planning.traffic import Sizes, Traffic, traffic
from qtale_jax.quantization.storage import array_bytes
from qtale_jax.training.start import prepare_abstract

KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)
"""The root key of a run, which every step is given."""


@dataclass(frozen=True)
class TrainingEstimate(Estimate):
    """A training step on every device of a topology.

    Attributes:
        rows: of a microbatch, per device.
        microbatches: parts of a step.
        model_flops: of a step on all devices, without what is computed again or twice (three forward passes).
        repeated: bytes of parameters that the program is given twice, the second time as the teacher's; they are there
            once, but the compiler does not know that.
        pieces: bytes of the largest array that fsdp puts together in a layer, in the embedding and in the head.
    """

    rows: int
    microbatches: int
    model_flops: float
    repeated: int
    pieces: dict[str, int]

    @property
    def arguments(self) -> int:
        """As the compiler counts them."""
        return super().arguments + self.repeated


class TrainingPlanner:
    """Estimates for one model and configuration on any mesh; what was traced is kept for the next mesh."""

    def __init__(self, config: Config, spec: ModelSpecification):
        """Takes the configuration and the model with its routers and adapters."""
        self.config, self.spec = config, spec
        self._steps: dict[int, tuple[StepShapes, Activations]] = {}
        self._tiled = topology(config.plan.topology).device.is_tpu
        self._states: dict[Sizes, tuple[dict[str, int], int, int, Traffic]] = {}

    def memory(self, sizes: Sizes, rows: int, microbatches: int) -> dict[str, int]:
        """Bytes per device for `rows` of a microbatch on each, at the moment of the step when most are there."""
        state, padded, _, sends = self._state(sizes)
        batch = [*batch_shapes(microbatches * rows, self.config.data.length).values(), KEY]
        activations, gradients = self._shapes(sizes[2])[1], state[trained_part(self.config)]
        # A microbatch's gradients stand beside the sum of those before it. At the head, whose gradient is the first,
        # the adapters of layers have none yet.
        before = 0 if microbatches == 1 else gradients
        first = gradients if self.config.train.parameters == "all" else 0
        moments = [
            {
                "gradients": before + first,
                "activations": activations.at_head(rows),
                "gathered weights": sends.gathered["head"],
            },
            {
                "gradients": before + gradients,
                "activations": activations.in_layer(rows),
                "gathered weights": sends.gathered["layer"],
            },
        ]
        found = {
            **state,
            **max(moments, key=lambda moment: sum(moment.values())),
            "batch": sum(map(array_bytes, batch)),
            "padding": padded + padding(batch) if self._tiled else 0,
        }
        if self._tiled:
            found["gaps"] = gaps(found)
        return {name: size for name, size in found.items() if size}

    def estimate(self, topology: Topology, sizes: Sizes, microbatches: int | None = None) -> TrainingEstimate:
        """The step as it is configured, or in another number of microbatches, whose rows the mesh divides."""
        train, length = self.config.train, self.config.data.length
        parts = train.microbatches if microbatches is None else microbatches
        rows = train.batch_size // parts // (sizes[0] * sizes[1])
        memory, (_, _, repeated, sends) = self.memory(sizes, rows, parts), self._state(sizes)
        step = self._shapes(sizes[2])[0].products(rows).times(parts)
        # Forward and backward pass each put the weights together; the update reads and writes what trains.
        update = (3 if parts == 1 else 4) * memory[trained_part(self.config)] + 2 * memory["optimizer"]
        work = roofline(
            topology,
            flops=step.flops,
            moved=step.bytes + update + parts * 2 * sends.weights,
            sent=parts * (2 * sends.weights + sends.gradients + rows * sends.per_row),
        )
        tokens = train.batch_size * length
        model_flops = tokens * training_flops_per_token(self.spec, length)
        return TrainingEstimate(memory, work, tokens, rows, parts, model_flops, repeated, sends.pieces)

    def _state(self, sizes: Sizes) -> tuple[dict[str, int], int, int, Traffic]:
        """Bytes of what lives through the run, what tiles add, what steps get twice, and what devices send."""
        if sizes not in self._states:
            mesh = abstract_mesh(sizes)
            start = prepare_abstract(self.config, self.spec, mesh)
            held = state_shards(self.config, start, mesh)
            padded = padding(leaf for leaves in held.values() for leaf in leaves)
            repeated = repeated_bytes(self.config, start)
            self._states[sizes] = total_bytes(held), padded, repeated, traffic(self.config, start, sizes)
        return self._states[sizes]

    def _shapes(self, tensor: int) -> tuple[StepShapes, Activations]:
        if tensor not in self._steps:
            shapes = StepShapes(self.config, self.spec, tensor)
            self._steps[tensor] = shapes, shapes.activations()
        return self._steps[tensor]
