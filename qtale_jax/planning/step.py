"""The training step as one device sees it, traced on shapes: arithmetic, and what its backward pass needs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qtale_jax.config import with_overrides
from qtale_jax.config.schema import Config
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.mesh import abstract_mesh
from qtale_jax.planning.program import Products, products
from qtale_jax.planning.residuals import distinct_bytes, kept_bytes
from qtale_jax.planning.subject import local_architecture
from qtale_jax.training import head
from qtale_jax.training.optimizer import Flat, build_optimizer
from qtale_jax.training.start import Start, prepare_abstract
from qtale_jax.training.step import TrainStep


@dataclass(frozen=True)
class Activations:
    """Bytes per device as a straight line in the rows of a microbatch: kept for the backward pass, and beside that.

    Attributes:
        kept: (of no rows, of each row) what the forward pass keeps.
        head: likewise, what the head works with besides.
        layer: likewise, what the backward pass of a layer works with besides.
    """

    kept: tuple[float, float]
    head: tuple[float, float]
    layer: tuple[float, float]

    def at_head(self, rows: int) -> int:
        """What is kept, and what the head works with."""
        return _sum(rows, self.kept, self.head)

    def in_layer(self, rows: int) -> int:
        """What is kept, and what a layer works with."""
        return _sum(rows, self.kept, self.layer)


def _sum(rows: int, *lines: tuple[float, float]) -> int:
    return math.ceil(sum(base + rows * slope for base, slope in lines))


class StepShapes:
    """The training step as one device of a tensor-parallel group sees it, on shapes."""

    def __init__(self, config: Config, spec: ModelSpecification, tensor: int):
        """Args are the configuration, the model with routers and adapters, and the size of the group."""
        self._config = config
        self.spec = spec.model_copy(update={"architecture": local_architecture(spec.architecture, tensor)})

    def products(self, rows: int) -> Products:
        """Products of the forward and backward passes of one microbatch."""
        loss, arguments = self._loss(self._config, self.spec, rows)
        return products(jax.value_and_grad(loss, has_aux=True), *arguments)

    def activations(self) -> Activations:
        """Bytes by rows.

        The step peaks either at the head, where the gradient of the logits stands beside all that is kept, or inside a
        layer that is computed again, where everything that the policy did not keep is there for one layer, the same
        numbers in another type or shape once. Logits in blocks are not kept, and the gradient of a block takes their
        place.
        """
        kept = self._line(self._config, self.spec, kept_bytes)
        length, vocabulary = self._config.data.length, self.spec.architecture.vocab_size
        logits = (0.0, 4.0 * length * vocabulary)
        if head.in_blocks(length, vocabulary, self._config.train.parameters == "all"):
            logits = (4.0 * head.BLOCK_TOKENS * vocabulary, 0.0)
        again = (0.0, 0.0)
        if self._config.train.remat != "none":
            everything = with_overrides(self._config, {"train": {"remat": "none"}})
            whole, part = self._layer(everything), self._layer(self._config)
            again = (whole[0] - part[0], whole[1] - part[1])
        return Activations(kept, logits, again)

    def _layer(self, config: Config) -> tuple[float, float]:
        """What one more layer of the last kind works with: the difference of two short models."""
        always_on = self.spec.routing.always_on_layers if self.spec.routing else 0
        shorter, longer = (self._line(config, self._with_layers(always_on + extra), distinct_bytes) for extra in (1, 2))
        return longer[0] - shorter[0], longer[1] - shorter[1]

    def _with_layers(self, layers: int) -> ModelSpecification:
        update: dict[str, Any] = {"architecture": self.spec.architecture.with_layers(range(layers))}
        if layers > self.spec.architecture.num_layers:
            update["quantization"] = None  # it has no formats for layers that are not there
        return self.spec.model_copy(update=update)

    def _line(self, config: Config, spec: ModelSpecification, count: Callable[..., int]) -> tuple[float, float]:
        one, two = (self._counted(config, spec, rows, count) for rows in (1, 2))
        return 2.0 * one - two, float(two - one)

    def _counted(self, config: Config, spec: ModelSpecification, rows: int, count: Callable[..., int]) -> int:
        loss, arguments = self._loss(config, spec, rows)
        return count(loss, *arguments)

    def _loss(self, config: Config, spec: ModelSpecification, rows: int):
        """The loss of `TrainStep` and the shapes of its arguments."""
        mesh = abstract_mesh((1, 1, 1))
        start = prepare_abstract(config, spec, mesh)
        step = TrainStep(spec, config, build_optimizer(config.train.optimizer, 1), 1)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        arguments = (
            start.trainable,
            start.frozen,
            teacher_of(config, start),
            batch_shapes(rows, config.data.length),
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.eval_shape(lambda: jax.random.key(0)),
            dict.fromkeys(("targets", "present", "counted"), number),
        )
        return step.loss, arguments


def teacher_of(config: Config, start: Start) -> Flat | None:
    """The abstract teacher of a run, as the training loop makes it."""
    if not config.train.distillation.active:
        return None
    return {path: leaf for path, leaf in (start.frozen | start.trainable).items() if "/lora/" not in path}


def batch_shapes(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the data pipeline, on shapes."""
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    return {"tokens": tokens, "targets": tokens, "segment_ids": tokens, "weights": weights}
