"""What a training step takes on every device of a mesh: memory, arithmetic, time."""

from dataclasses import dataclass

from qtale_jax.config.schema import Config
from qtale_jax.models.cost import training_flops_per_token
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.mesh import abstract_mesh
from qtale_jax.planning.devices import Topology
from qtale_jax.planning.roofline import Estimate, roofline
from qtale_jax.planning.state import state_bytes, trained_part
from qtale_jax.planning.step import Activations, StepShapes, batch_shapes
from qtale_jax.planning.traffic import Sizes, Traffic, traffic
from qtale_jax.quantization.storage import array_bytes
from qtale_jax.training.start import prepare_abstract


@dataclass(frozen=True)
class TrainingEstimate(Estimate):
    """A training step on every device of a topology.

    Attributes:
        rows: of a microbatch, per device.
        microbatches: parts of a step.
        model_flops: of a step on all devices, without what is computed again or twice (three forward passes).
    """

    rows: int
    microbatches: int
    model_flops: float


class TrainingPlanner:
    """Estimates for one model and configuration on any mesh; what was traced is kept for the next mesh."""

    def __init__(self, config: Config, spec: ModelSpecification):
        """Takes the configuration and the model with its routers and adapters."""
        self.config, self.spec = config, spec
        self._steps: dict[int, tuple[StepShapes, Activations]] = {}
        self._states: dict[Sizes, tuple[dict[str, int], Traffic]] = {}

    def memory(self, sizes: Sizes, rows: int, microbatches: int) -> dict[str, int]:
        """Bytes per device for `rows` of a microbatch on each."""
        state, sends = self._state(sizes)
        batch = sum(map(array_bytes, batch_shapes(rows, self.config.data.length).values()))
        found = {
            **state,
            # A microbatch's gradients stand beside the sum of those before it.
            "gradients": state[trained_part(self.config)] * (1 if microbatches == 1 else 2),
            "activations": self._shapes(sizes[2])[1].bytes(rows),
            "gathered weights": sends.gathered,
            "batch": microbatches * batch,
        }
        return {name: size for name, size in found.items() if size}

    def estimate(self, topology: Topology, sizes: Sizes) -> TrainingEstimate:
        """The step as it is configured, whose rows the mesh divides."""
        train, length = self.config.train, self.config.data.length
        rows = train.batch_size // train.microbatches // (sizes[0] * sizes[1])
        memory, sends = self.memory(sizes, rows, train.microbatches), self._state(sizes)[1]
        step = self._shapes(sizes[2])[0].products(rows).times(train.microbatches)
        # Forward and backward pass each put the weights together; the update reads and writes what trains.
        update = 2 * (memory[trained_part(self.config)] + memory["optimizer"]) + memory["gradients"]
        work = roofline(
            topology,
            flops=step.flops,
            moved=step.bytes + update + train.microbatches * 2 * sends.weights,
            sent=train.microbatches * (2 * sends.weights + sends.gradients + rows * sends.per_row),
        )
        tokens = train.batch_size * length
        model_flops = tokens * training_flops_per_token(self.spec, length)
        return TrainingEstimate(memory, work, tokens, rows, train.microbatches, model_flops)

    def _state(self, sizes: Sizes) -> tuple[dict[str, int], Traffic]:
        if sizes not in self._states:
            mesh = abstract_mesh(sizes)
            start = prepare_abstract(self.config, self.spec, mesh)
            self._states[sizes] = state_bytes(self.config, start, mesh), traffic(self.config, start, sizes)
        return self._states[sizes]

    def _shapes(self, tensor: int) -> tuple[StepShapes, Activations]:
        if tensor not in self._steps:
            shapes = StepShapes(self.config, self.spec, tensor)
            self._steps[tensor] = shapes, shapes.activations()
        return self._steps[tensor]
