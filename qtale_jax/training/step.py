"""One training step as a pure function: losses, gradients over microbatches, update, metrics."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qtale_jax.config.schema import Config
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.forward import positions_of, run_trunk
from qtale_jax.models.policy import Dense, gap
from qtale_jax.models.skipping import Skipping
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.training import head, objective
from qtale_jax.training.aim import aim_of, training_policy
from qtale_jax.training.optimizer import Flat, nest
from qtale_jax.training.quantization_aware import quantizer_transform

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


class TrainStep:
    """Builds the pure step for one model and configuration; `__call__` is what gets jitted."""

    def __init__(self, spec: ModelSpecification, config: Config, optimizer: optax.GradientTransformation, steps: int):
        self.__name__ = "train_step"  # what the compiled program is called in traces and compilation logs
        self.spec, self.config, self.optimizer, self.steps = spec, config, optimizer, steps
        self.trunk = functools.partial(
            run_trunk, compute_dtype=jnp.dtype(config.train.compute_dtype), remat=config.train.remat
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
        route_key, dropout_key = jax.random.split(key)
        run_key = jax.random.key(config.seed)  # what belongs to a step is the same for all of its microbatches
        if config.train.quantization_aware.formats:
            spec = spec.model_copy(update={"lora": None})
            transform = quantizer_transform(config.train.quantization_aware, step, jax.random.fold_in(run_key, 0))
        aim = aim_of(config.routing, spec, step, self.steps, jax.random.fold_in(run_key, 1)) if spec.routing else None
        share = config.train.skipped_share
        hidden, routing, gates = self.trunk(
            spec,
            params,
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            policy=training_policy(config.routing, aim, route_key) if aim else Dense(),
            dropout_key=dropout_key if spec.lora else None,
            layer_transform=transform,
            skipping=Skipping(jax.random.fold_in(key, 2), share) if share else None,
        )
        dense = None
        if teacher is not None:
            base = spec.model_copy(update={"lora": None})
            dense, _, _ = self.trunk(
                base, nest(teacher), batch["tokens"], segment_ids=batch["segment_ids"], policy=Dense()
            )
        loss, metrics = self._head_losses(params, hidden, teacher, dense, batch, totals)
        if dense is not None and config.train.distillation.hidden_weight:
            distance = objective.hidden_distance(hidden, jax.lax.stop_gradient(dense))
            present = (batch["segment_ids"] > 0).astype(jnp.float32)
            metrics["hidden_distance"] = objective.weighted_mean(distance, present, totals["present"])
            loss += config.train.distillation.hidden_weight * metrics["hidden_distance"]
        if spec.routing is not None:
            assert aim is not None and gates is not None, "a training policy gives gates"
            counted, always_on = counted_tokens(spec, batch["segment_ids"]), spec.routing.always_on_layers
            mean = functools.partial(objective.weighted_mean, weights=counted, total=totals["counted"])
            share = objective.executed_share(gates, always_on, config.routing.counting)
            execute = routing.execute[..., always_on:]
            gaps = gap(routing.logits)
            parts = {}
            if config.routing.method == "mod":
                parts["choice_loss"] = mean(jnp.mean(objective.choice_loss(gaps, execute), axis=-1))
                loss += aim.rate_weight * parts["choice_loss"]
            elif config.routing.method != "random":
                parts["rate_loss"] = objective.rate_loss(
                    share, counted, totals["counted"], aim.target, config.routing.rate_loss
                )
                penalty = objective.entropy_penalty(gaps, config.routing.entropy_form)
                parts["entropy_loss"] = mean(jnp.mean(penalty, axis=-1))
                loss += aim.rate_weight * parts["rate_loss"] + aim.entropy_weight * parts["entropy_loss"]
            logits = routing.logits.at[..., 1].add(aim.shift)
            metrics |= {**parts, "executed_ratio": mean(share), "routing": (logits, execute)}
            if config.routing.target_range is not None:
                metrics["target"] = mean(jnp.full_like(share, aim.target))  # adds up over microbatches
        return loss, {"loss": loss, **metrics}

    def _head_losses(
        self, params: Parameters, hidden: Array, teacher: Flat | None, dense: Array | None, batch: Batch, totals: dict
    ) -> tuple[Array, Metrics]:
        """Cross-entropy and distillation from the hidden states of the model and of its teacher."""
        settings, trained = self.config.train.distillation, self.config.train.parameters == "all"
        kind = head.Head(self.spec)
        given = head.Given(head.needed(params), totals["targets"])
        positions = head.Positions(batch["targets"], batch["weights"])
        if teacher is not None and settings.weight:
            kind = head.Head(self.spec, settings.weight, settings.temperature)
            if trained:  # otherwise it is the same head, which need not be put together twice
                given = dataclasses.replace(given, teacher=head.needed(nest(teacher)))
            positions = dataclasses.replace(positions, teacher=dense)
        return head.losses(kind, hidden, given, positions, trained)

    def __call__(
        self, state: TrainState, frozen: Flat, teacher: Flat | None, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        """Advances one step; `key` is the run's root key, folded with the step number."""
        parts = self.config.train.microbatches
        present = (batch["segment_ids"] > 0).astype(jnp.float32)
        totals = {"targets": jnp.sum(batch["weights"]), "present": jnp.sum(present)}
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
