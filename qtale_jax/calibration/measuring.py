"""Measuring the parts of a decode step on this device, with the programs that the engine runs.

One program is measured, `inference.decode.decode` with a theta per row, as the server has it: which rows execute which
layers is then an argument, so that every size that the engine compacts into is timed by giving so many rows a theta of
0 and the others one that no probability reaches. The ends of the model and its routers are also timed alone.
"""

import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qtale_jax.artifact import versions
from qtale_jax.calibration.latency import LatencyTable, LayerSeconds
from qtale_jax.config.budget import BudgetConfig
from qtale_jax.errors import InputError
from qtale_jax.inference.decode import decode
from qtale_jax.inference.joining import empty_rows
from qtale_jax.inference.pages import PagedCache, empty_pages
from qtale_jax.inference.rows import Rows, choose
from qtale_jax.inference.skipping import ROW_SHARES, sizes
from qtale_jax.inference.streaming import Options
from qtale_jax.models.decoder import Parameters, skeleton
from qtale_jax.models.forward import embed, merge, unembed
from qtale_jax.models.policy import Thresholded, probability
from qtale_jax.models.specification import LINEARS, ModelSpecification
from qtale_jax.reporting.environment import environment

EXECUTE, SKIP = 0.0, 2.0
"""Thetas that every probability reaches, and that none does."""


def hardware() -> str:
    """The device that programs run on: an accelerator's name, or the processor and the cores that may be used."""
    device = jax.local_devices()[0]
    return environment()["Processor"] if device.platform == "cpu" else device.device_kind


def model_digest(spec: ModelSpecification, compute_dtype: jnp.dtype) -> str:
    """Identifies what the time of a step depends on: not the values of weights and thresholds, but all else."""
    shape = spec.structure.model_dump(mode="json", exclude={"quantization", "dropped_layers"})
    formats = spec.quantization.model_dump(mode="json")["formats"] if spec.quantization else {}
    text = json.dumps([shape, formats, jnp.dtype(compute_dtype).name], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def measured_context(spec: ModelSpecification, settings: BudgetConfig) -> int:
    """Tokens that every layer keeps when the measurement starts: the prompt, or the always-on tokens if it is shorter.

    Raises:
        InputError: the prompt and the tokens that are timed exceed the model's context.
    """
    assert spec.routing is not None, "checked before"
    room = spec.architecture.max_length - Options().chunk
    if settings.prompt_length > room:
        raise InputError(
            f"budget.prompt_length={settings.prompt_length} and the {Options().chunk} tokens that are timed exceed the "
            f"model's context of {spec.architecture.max_length}; "
            + (f"allowed: up to {room}" if room > 0 else "no speed can be measured with so short a context")
        )
    return max(settings.prompt_length, spec.routing.always_on_tokens)


def measure(
    spec: ModelSpecification, params: Parameters, settings: BudgetConfig, compute_dtype: jnp.dtype
) -> LatencyTable:
    """Fills a table: medians over `settings.repeats` rounds, in each of which everything is measured once.

    Args:
        spec: a routed model.
        params: one tree per layer.
        settings: batch size and prompt length.
        compute_dtype: type of activations.

    Raises:
        InputError: the prompt does not fit the model's context.
    """
    context, batch = measured_context(spec, settings), settings.batch_size
    of_batch, makes = sizes(batch, ROW_SHARES), layers_by_make(spec)
    step = _Step(spec, params, batch, context, jnp.dtype(compute_dtype))
    first = spec.routed_layers[0]
    candidates = {"idle": step.timed(step.thresholds((), 0)), "ends": step.timed_ends()}
    if spec.layers_with_router:
        candidates["routers"] = step.timed_routers()
    for index, layers in enumerate(makes):
        for rows in of_batch[1:]:
            thresholds = step.thresholds([layer - first for layer in layers], rows)
            candidates[f"{index}/{rows}"] = step.timed(thresholds)
    found = medians(candidates, settings.repeats)

    def added(index: int, rows: int) -> float:
        return (found[f"{index}/{rows}"] - found["idle"]) / len(makes[index]) if rows else 0.0

    return LatencyTable(
        hardware=hardware(),
        versions=versions(),
        model=model_digest(spec, compute_dtype),
        rows=batch,
        context=context,
        repeats=settings.repeats,
        sizes=of_batch,
        idle=found["idle"],
        ends=found["ends"],
        router=found.get("routers", 0.0) / max(1, len(spec.layers_with_router)),
        layers=tuple(
            LayerSeconds(layers, tuple(added(index, rows) for rows in of_batch)) for index, layers in enumerate(makes)
        ),
    )


def medians(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what each candidate returns, after one call to warm up; in turns, so that a slow spell hits all."""
    for seconds in candidates.values():
        seconds()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, seconds in candidates.items():
            times[name].append(seconds())
    return {name: statistics.median(values) for name, values in times.items()}


def layers_by_make(spec: ModelSpecification) -> tuple[tuple[int, ...], ...]:
    """The routed layers, those together that have the same storage formats and the same kind of attention."""
    found: dict[tuple, list[int]] = {}
    for layer in spec.routed_layers:
        formats = tuple(spec.quantization.format(layer, name) for name in LINEARS) if spec.quantization else ()
        found.setdefault((formats, spec.architecture.is_local(layer)), []).append(layer)
    return tuple(map(tuple, found.values()))


class _Step:
    """Timed calls of as many steps as the engine takes in one; every call begins with the same cache and rows."""

    def __init__(self, spec: ModelSpecification, params: Parameters, rows: int, context: int, compute_dtype: jnp.dtype):
        self._spec, self._params, self._dtype = spec, params, compute_dtype
        self._rows, self._context, self._options = rows, context, Options(compute_dtype=compute_dtype)

    def thresholds(self, routed: tuple[int, ...] | list[int], rows: int) -> Float[Array, "r b 1"]:
        """Theta with which the first `rows` rows execute some of the routed layers, and nobody the others."""
        values = np.full((len(self._spec.routed_layers), self._rows, 1), SKIP, np.float32)
        values[list(routed), :rows] = EXECUTE
        return jnp.asarray(values)

    def timed(self, thresholds: Float[Array, "r b 1"]) -> Callable[[], float]:
        """Seconds of a decode step."""

        def seconds() -> float:
            cache, rows = jax.block_until_ready((self._cache(), self._start()))
            start = time.perf_counter()
            _, _, chunk = decode(
                self._spec.structure,
                self._params,
                cache,
                rows,
                Thresholded(thresholds),
                chunk=self._options.chunk,
                compute_dtype=self._dtype,
            )
            steps = int(chunk.steps)
            assert steps == self._options.chunk, "no row ends, and the pool is large enough"
            return (time.perf_counter() - start) / steps

        return seconds

    def timed_ends(self) -> Callable[[], float]:
        """Seconds of embedding, head and choice, per step."""
        rows = self._start()
        return self._per_step(lambda steps: _ends(self._spec.structure, self._params, rows, steps, self._dtype))

    def timed_routers(self) -> Callable[[], float]:
        """Seconds of all routers, per step."""
        hidden = jnp.ones((self._rows, 1, self._spec.architecture.hidden_size), self._dtype)
        return self._per_step(lambda steps: _routers(self._spec.structure, self._params, hidden, steps))

    def _per_step(self, run: Callable[[int], Array]) -> Callable[[], float]:
        steps = self._options.chunk

        def seconds() -> float:
            start = time.perf_counter()
            jax.block_until_ready(run(steps))
            return (time.perf_counter() - start) / steps

        return seconds

    def _start(self) -> Rows:
        """Rows that decode greedily after `context` tokens, and do not end."""
        count = self._rows
        return dataclasses.replace(
            empty_rows(count),
            position=jnp.full((count,), self._context, jnp.int32),
            limit=jnp.full((count,), np.iinfo(np.int32).max, jnp.int32),
            done=jnp.zeros((count,), jnp.bool_),
        )

    def _cache(self) -> PagedCache:
        """A cache whose rows keep `context` tokens in every layer, with room for those of one call."""
        architecture, page = self._spec.architecture, self._options.page
        slots = self._context + self._options.chunk
        pages = self._options.growth(architecture, self._rows, slots).most
        cache = empty_pages(architecture, self._rows, slots, pages, self._options.stored_dtype, page)
        each = -(-self._context // page)
        used = architecture.num_layers * self._rows * each
        ids = jnp.arange(used, dtype=jnp.int32).reshape(*cache.counts.shape, each)
        positions = jnp.tile(jnp.arange(each * page, dtype=jnp.int32), used // each).reshape(used, page)
        return dataclasses.replace(
            cache,
            pool=dataclasses.replace(cache.pool, positions=cache.pool.positions.at[:used].set(positions)),
            used=jnp.int32(used),
            table=cache.table.at[:, :, :each].set(ids),
            counts=jnp.full(cache.counts.shape, self._context, jnp.int32),
        )


@functools.partial(jax.jit, static_argnames=("spec", "steps", "dtype"))
def _ends(spec: ModelSpecification, params: Parameters, rows: Rows, steps: int, dtype: jnp.dtype) -> Array:
    def one(_, token):
        hidden = embed(spec, params, token[:, None], dtype)
        logits = unembed(spec, params, hidden)[:, 0]
        return choose(logits, rows.key, rows.count, rows.temperature, rows.top_p)

    return jax.lax.fori_loop(0, steps, one, rows.token)


@functools.partial(jax.jit, static_argnames=("spec", "steps"))
def _routers(spec: ModelSpecification, params: Parameters, hidden: Float[Array, "b 1 d"], steps: int) -> Array:
    blocks = [merge(skeleton(spec).layers[layer], params["layers"][layer]) for layer in spec.layers_with_router]

    def one(_, hidden):
        for block in blocks:  # what one decides, the next one sees: none can be left out or taken out of the loop
            execute = probability(block.router(hidden)) >= 0.5
            hidden = jnp.where(execute[:, :, None], hidden, -hidden)
        return hidden

    return jax.lax.fori_loop(0, steps, one, hidden)
