"""One training step as a pure function: losses, gradients over microbatches, update, metrics."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qtale_jax.config.schema import Config, QuantizationAwareConfig
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.forward import forward, positions_of
from qtale_jax.models.lora import map_linears, merged_kernel
from qtale_jax.models.policy import Dense, Sampled
from qtale_jax.models.specification import ModelSpecification, TensorFormat
from qtale_jax.quantization.rounding import fake_quantize_straight_through
from qtale_jax.training import objective
from qtale_jax.training.optimizer import Flat, nest

Batch = dict[str, Array]
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes: trainable parameters (flat), optimizer state, number of finished steps.

    `bad_step` is the first step whose loss or gradient was not finite, -1 while there is none. From then on parameters
    are left alone, so that the last good values survive until the host looks.
    """

    step: Int[Array, ""]
    bad_step: Int[Array, ""]
    trainable: Flat
    optimizer: Any


def initial_state(trainable: Flat, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32), trainable, optimizer.init(trainable))


def quantizer_transform(config: QuantizationAwareConfig, active: Array):
    """Merges adapters layer by layer and, where `active`, rounds the merged weights with a straight-through gradient.

    Works inside the layer scan, so only one layer's merged weights exist at a time.
    """
    if config.bits == 16:
        raise ValueError("16 bits are full precision: there is nothing to train for")
    format = TensorFormat(bits=config.bits, group_size=config.group_size, symmetric=config.symmetric)

    def transform(layer: Parameters) -> Parameters:
        def one(_name: str, linear: Parameters) -> Parameters:
            kernel = merged_kernel(linear) if "lora" in linear else linear["kernel"]
            return {"kernel": jnp.where(active, fake_quantize_straight_through(kernel, format), kernel)}

        return map_linears(one, layer)

    return transform


def rate_weight(config: Config, progress: Float[Array, ""]) -> Float[Array, ""]:
    """lambda_1 at `progress` in [0, 1]: rises as a quarter sine from 0, or constant."""
    shape = jnp.sin(0.5 * math.pi * progress) if config.routing.rate_schedule == "sin" else jnp.ones_like(progress)
    return config.routing.rate_weight * shape


class TrainStep:
    """Builds the pure step for one model and configuration; `__call__` is what gets jitted."""

    def __init__(self, spec: ModelSpecification, config: Config, optimizer: optax.GradientTransformation, steps: int):
        self.__name__ = "train_step"  # what the compiled program is called in traces and compilation logs
        self.spec, self.config, self.optimizer, self.steps = spec, config, optimizer, steps
        self.forward = functools.partial(
            forward, compute_dtype=jnp.dtype(config.train.compute_dtype), remat=config.train.remat
        )

    def loss(
        self,
        trainable: Flat,
        frozen: Flat,
        teacher: Flat | None,
        batch: Batch,
        step: Array,
        key: PRNGKeyArray,
        totals: dict,
    ) -> tuple[Array, Metrics]:
        """Loss of one microbatch; `totals` are the weights of the whole batch, so that microbatches add up."""
        config, spec = self.config, self.spec
        params, transform = nest(trainable, frozen), None
        qat = config.train.quantization_aware
        if qat.bits != 16:
            spec = spec.model_copy(update={"lora": None})
            transform = quantizer_transform(qat, step % qat.every == 0)
        route_key, dropout_key = jax.random.split(key)
        output = self.forward(
            spec,
            params,
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            policy=Sampled(route_key, config.routing.temperature, config.routing.eviction_gradient)
            if spec.routing
            else Dense(),
            dropout_key=dropout_key if spec.lora else None,
            layer_transform=transform,
        )
        nats = objective.token_cross_entropy(output.logits, batch["targets"])
        cross_entropy = objective.weighted_mean(nats, batch["weights"], totals["targets"])
        loss: Array = cross_entropy
        metrics: Metrics = {"cross_entropy": cross_entropy}
        if teacher is not None:
            base = spec.model_copy(update={"lora": None})
            dense = self.forward(base, nest(teacher), batch["tokens"], segment_ids=batch["segment_ids"], policy=Dense())
            kl = objective.distillation_loss(
                output.logits, jax.lax.stop_gradient(dense.logits), config.train.distillation.temperature
            )
            metrics["distillation"] = objective.weighted_mean(kl, batch["weights"], totals["targets"])
            loss += config.train.distillation.weight * metrics["distillation"]
        if spec.routing is not None:
            routing, counted = config.routing, counted_tokens(spec, batch["segment_ids"])
            assert output.gates is not None, "a sampling policy gives gates"
            share = objective.executed_share(output.gates, spec.routing.always_on_layers, routing.counting)
            rate = objective.rate_loss(share, counted, totals["counted"], routing.target, routing.rate_loss)
            gaps = output.routing.logits[..., 1] - output.routing.logits[..., 0]
            penalty = jnp.mean(objective.entropy_penalty(gaps, routing.entropy_form), axis=-1)
            entropy_loss = objective.weighted_mean(penalty, counted, totals["counted"])
            progress = step.astype(jnp.float32) / self.steps
            loss += rate_weight(config, progress) * rate + routing.effective_entropy_weight * entropy_loss
            metrics |= {
                "rate_loss": rate,
                "entropy_loss": entropy_loss,
                "executed_ratio": objective.weighted_mean(share, counted, totals["counted"]),
                "routing": (output.routing.logits, output.routing.execute[..., spec.routing.always_on_layers :]),
            }
        return loss, {"loss": loss, **metrics}

    def __call__(
        self, state: TrainState, frozen: Flat, teacher: Flat | None, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        """Advances one step; `key` is the run's root key, folded with the step number."""
        parts = self.config.train.microbatches
        totals = {"targets": jnp.sum(batch["weights"])}
        if self.spec.routing is not None:
            totals["counted"] = jnp.sum(counted_tokens(self.spec, batch["segment_ids"]))
        gradient = jax.value_and_grad(self.loss, has_aux=True)
        step_key = jax.random.fold_in(key, state.step)
        if parts == 1:
            (_, metrics), grads = gradient(state.trainable, frozen, teacher, batch, state.step, step_key, totals)
            metrics, statistics = self._statistics(metrics, batch)
        else:
            split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

            def part(inputs):
                index, micro = inputs
                part_key = jax.random.fold_in(step_key, index)
                (_, metrics), grads = gradient(state.trainable, frozen, teacher, micro, state.step, part_key, totals)
                metrics, statistics = self._statistics(metrics, micro)
                return (grads, metrics), statistics

            def accumulate(total, inputs):
                values, statistics = part(inputs)
                return jax.tree.map(jnp.add, total, values), statistics

            first = (jnp.int32(0), jax.tree.map(lambda x: x[0], split))
            like, _ = jax.eval_shape(part, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            (grads, metrics), statistics = jax.lax.scan(accumulate, zeros, (jnp.arange(parts), split))
            statistics = jax.tree.map(lambda x: jnp.mean(x, axis=0), statistics)
        return self._update(state, grads, metrics | statistics)

    def _statistics(self, metrics: Metrics, batch: Batch) -> tuple[Metrics, Metrics]:
        """Takes the raw routing out of the metrics and summarises it."""
        if "routing" not in metrics:
            return metrics, {}
        logits, execute = metrics["routing"]
        counted = counted_tokens(self.spec, batch["segment_ids"])
        summary = objective.routing_statistics(jax.lax.stop_gradient(logits), execute, counted)
        return {name: value for name, value in metrics.items() if name != "routing"}, summary

    def _update(self, state: TrainState, grads: Flat, metrics: Metrics) -> tuple[TrainState, Metrics]:
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & (state.bad_step < 0)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        bad = jnp.where(finite | (state.bad_step >= 0), state.bad_step, state.step)
        new = TrainState(state.step + 1, bad, keep(trainable, state.trainable), keep(optimizer, state.optimizer))
        return new, metrics | {"gradient_norm": norm}


def counted_tokens(spec: ModelSpecification, segment_ids: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """1 for tokens whose routing counts: not padding and not among the first, always-on ones."""
    first = positions_of(segment_ids) < (spec.routing.always_on_tokens if spec.routing else 0)
    return ((segment_ids > 0) & ~first).astype(jnp.float32)
