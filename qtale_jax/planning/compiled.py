"""The real steps compiled for TPUs that are not there: libtpu compiles for a topology on any host with an x86 CPU."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from qtale_jax.config.schema import Config, MeshConfig
from qtale_jax.inference.decode import decode
from qtale_jax.inference.joining import empty_rows
from qtale_jax.inference.pages import empty_pages
from qtale_jax.inference.policies import inference_policy
from qtale_jax.inference.prefill import prefill
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.parallel.axes import partition_spec
from qtale_jax.parallel.mesh import build_mesh, replicated
from qtale_jax.planning.collectives import collectives
from qtale_jax.planning.inference import InferencePlanner
from qtale_jax.planning.plan import Subject
from qtale_jax.planning.step import batch_shapes, teacher_of
from qtale_jax.training.optimizer import build_optimizer
from qtale_jax.training.start import prepare_abstract, state_shardings
from qtale_jax.training.step import TrainStep, initial_state

STEPS = 1000
"""Steps of the run that is compiled; the learning rate's schedule is all that depends on it."""


def compile_steps(config: Config, subject: Subject, say: Callable[[str], None]) -> dict[str, Any]:
    """Compiles the steps of `plan.compile` and returns what the compiler says of each, by name.

    A program that it refuses, because it would not fit, has an `error` instead of numbers.

    Args:
        config: the configuration.
        subject: what is planned for.
        say: called with a line before and after each program.
    """
    devices = topology_devices(subject.topology.name)
    jobs: dict[str, Callable[[], Any]] = {}
    if "train" in config.plan.compile:
        jobs["train"] = functools.partial(_lower_training, config, subject, devices)
    planner = InferencePlanner(config, subject.deployed, subject.topology)
    for step, lower in (("prefill", _lower_prefill), ("decode", _lower_decode)):
        if step in config.plan.compile:
            for rows in config.plan.batch_sizes:
                jobs[f"{step}, batch {rows}"] = functools.partial(lower, planner, rows, devices[:1])
    found = {}
    for name, lower in jobs.items():
        say(f"compiling {name} for {subject.topology.name}")
        start = time.perf_counter()
        try:
            told = facts(lower().compile())
        except jax.errors.JaxRuntimeError as error:  # above all: it does not fit
            told = {"error": str(error).splitlines()[0]}
        seconds = round(time.perf_counter() - start, 1)
        found[name] = {"compile_seconds": seconds, **told}
        say(f"{'not ' if 'error' in told else ''}compiled after {seconds} s")
    return found


def facts(program: jax.stages.Compiled) -> dict[str, Any]:
    """Bytes of memory, cost analysis and collectives of a compiled program, per device."""
    memory = program.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: int(getattr(memory, f"{name}_size_in_bytes")) for name in names}
    total = sum(sizes.values()) - 2 * sizes["alias"]
    cost = program.cost_analysis() or {}
    return {
        "bytes": {**sizes, "total": total},
        "cost, loops counted once": {name: float(cost[name]) for name in ("flops", "bytes accessed") if name in cost},
        "collectives": collectives(program.as_text() or ""),
    }


def topology_devices(name: str) -> list:
    """The devices of a topology, v5e:2x2 for example, which programs can be compiled for."""
    # Without these libtpu looks for the machine that it runs on, complains, and refuses to be loaded by two processes.
    quiet = {
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for variable, value in quiet.items():
        os.environ.setdefault(variable, value)
    return list(topologies.get_topology_desc(name, "tpu").devices)


def _lower_training(config: Config, subject: Subject, devices: list) -> jax.stages.Lowered:
    """The step as the training loop compiles it."""
    mesh = build_mesh(config.mesh, devices)
    start = prepare_abstract(config, subject.spec, mesh)
    optimizer = build_optimizer(config.train.optimizer, STEPS)
    state = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer), start.trainable)
    placed = state_shardings(start, optimizer, mesh)
    rows = NamedSharding(mesh, partition_spec(("batch", "length")))
    batch = batch_shapes(config.train.batch_size, config.data.length)
    teacher = teacher_of(config, start)
    step = jax.jit(TrainStep(subject.spec, config, optimizer, STEPS), donate_argnums=0, out_shardings=(placed, None))
    arguments = (
        _on(state, placed),
        _on(start.frozen, {path: start.shardings[path] for path in start.frozen}),
        None if teacher is None else _on(teacher, {path: start.shardings[path] for path in teacher}),
        _on(batch, dict.fromkeys(batch, rows)),
        _on(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh)),
    )
    with jax.set_mesh(mesh):  # only now: what runs while it is set runs on its devices, and there are none
        return step.trace(*arguments).lower(lowering_platforms=("tpu",))


def _lower_decode(planner: InferencePlanner, rows: int, devices: list) -> jax.stages.Lowered:
    """A chunk of the engine's decode loop."""
    where, arguments = _engine(planner, "decode", rows, devices)
    state = jax.eval_shape(lambda: empty_rows(rows))
    traced = decode.trace(
        planner.spec.structure,
        *arguments[:2],
        _one(state, where),
        arguments[2],
        chunk=planner.options.chunk,
        compute_dtype=planner.options.compute_dtype,
    )
    return traced.lower(lowering_platforms=("tpu",))


def _lower_prefill(planner: InferencePlanner, rows: int, devices: list) -> jax.stages.Lowered:
    """One part of the prompts, as wide as the engine runs them."""
    where, (params, cache, policy) = _engine(planner, "prefill", rows, devices)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=where)
    last = jax.ShapeDtypeStruct(
        (rows, planner.spec.architecture.hidden_size), planner.options.compute_dtype, sharding=where
    )
    traced = prefill.trace(
        planner.spec.structure,
        params,
        integers((rows, planner.width)),
        integers(()),
        integers((rows,)),
        integers((rows,)),
        cache,
        last,
        policy,
        compute_dtype=planner.options.compute_dtype,
    )
    return traced.lower(lowering_platforms=("tpu",))


def _engine(planner: InferencePlanner, step: str, rows: int, devices: list) -> tuple[NamedSharding, tuple]:
    """Where everything is, and the shapes of parameters, cache and policy."""
    where = replicated(build_mesh(MeshConfig(), devices))
    options, spec = planner.options, planner.spec
    cache = jax.eval_shape(
        lambda: empty_pages(
            spec.architecture, rows, planner.slots, planner.pages(step, rows), options.stored_dtype, options.page
        )
    )
    policy = jax.eval_shape(lambda: inference_policy(spec))
    return where, tuple(_one(tree, where) for tree in (abstract_parameters(spec), cache, policy))


def _one(tree: Any, where: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def _on(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )
