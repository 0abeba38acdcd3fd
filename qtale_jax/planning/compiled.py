"""The real steps compiled for TPUs that are not there: libtpu compiles for a topology on any host with an x86 CPU."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from qtale_jax.config.loading import with_overrides
from qtale_jax.config.schema import Config, MeshConfig
from qtale_jax.inference.decode import decode
from qtale_jax.inference.prefill import prefill
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.axes import AXES, partition_spec
from qtale_jax.parallel.mesh import build_mesh, replicated
from qtale_jax.planning.collectives import collectives, gathered
from qtale_jax.planning.comparison import PROPOSAL, TRAIN, name_of
from qtale_jax.planning.inference import InferencePlanner
from qtale_jax.planning.plan import Subject
from qtale_jax.planning.proposal import Proposal
from qtale_jax.planning.step import batch_shapes, teacher_of
from qtale_jax.training.optimizer import build_optimizer
from qtale_jax.training.start import prepare_abstract, state_shardings
from qtale_jax.training.step import TrainStep, initial_state

LARGEST = 8
"""All-gathers that are listed one by one."""

STEPS = 1000
"""Steps of the run that is compiled; the learning rate's schedule is all that depends on it."""


def compile_steps(
    config: Config, subject: Subject, proposal: Proposal | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Compiles the steps of `plan.compile` and returns what the compiler says of each, by name.

    A program that it refuses, because it would not fit, has an `error` instead of numbers.

    Args:
        config: the configuration.
        subject: what is planned for.
        proposal: the smallest topology that takes the training step.
        say: called with a line before and after each program.
    """
    devices = topology_devices(subject.topology.name)
    jobs: dict[str, Callable[[], Any]] = {}
    if "train" in config.plan.compile:
        jobs[TRAIN] = functools.partial(_lower_training, config, subject.spec, devices)
    if "proposal" in config.plan.compile and proposal is not None:
        mesh = dict(zip(AXES, proposal.mesh, strict=True))
        other = with_overrides(config, {"mesh": mesh, "train": {"microbatches": proposal.microbatches}})
        there = topology_devices(proposal.topology)
        jobs[PROPOSAL] = functools.partial(_lower_training, other, subject.spec, there)
    planner = InferencePlanner(config, subject.deployed, subject.topology)
    for step, lower in (("prefill", _lower_prefill), ("decode", _lower_decode)):
        if step in config.plan.compile:
            for rows in config.plan.batch_sizes:
                jobs[name_of(step, rows)] = functools.partial(lower, planner, rows, devices[:1])
    found = {}
    for name, lower in jobs.items():
        say(f"compiling {name} for {proposal.topology if name == PROPOSAL and proposal else subject.topology.name}")
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
    assert memory is not None, "compilers for TPUs analyse it"
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: int(getattr(memory, f"{name}_size_in_bytes")) for name in names}
    total = sum(sizes.values()) - 2 * sizes["alias"]
    cost, text = program.cost_analysis() or {}, program.as_text() or ""
    return {
        "bytes": {**sizes, "total": total},
        "peak bytes": int(memory.peak_memory_in_bytes),
        "cost, loops counted once": {name: float(cost[name]) for name in ("flops", "bytes accessed") if name in cost},
        "collectives": collectives(text),
        "largest all-gathers": gathered(text)[:LARGEST],
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
    # It takes hosts to have four chips, of which one chip is not a multiple.
    single = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith(":1x1") else {}
    return list(topologies.get_topology_desc(name, "tpu", **single).devices)


def _lower_training(config: Config, spec: ModelSpecification, devices: list) -> jax.stages.Lowered:
    """The step as the training loop compiles it."""
    mesh = build_mesh(config.mesh, devices)
    start = prepare_abstract(config, spec, mesh)
    optimizer = build_optimizer(config.train.optimizer, STEPS)
    state = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer), start.trainable)
    placed = state_shardings(start, optimizer, mesh)
    rows = NamedSharding(mesh, partition_spec(("batch", "length")))
    batch = batch_shapes(config.train.batch_size, config.data.length)
    teacher = teacher_of(config, start)
    step = jax.jit(TrainStep(spec, config, optimizer, STEPS), donate_argnums=0, out_shardings=(placed, None))
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
    given = _engine(planner, "decode", rows, devices)
    traced = decode.trace(
        planner.spec.structure,
        given["weights"],
        given["KV cache"],
        given["rows"],
        given["policy"],
        chunk=planner.options.chunk,
        compute_dtype=planner.options.compute_dtype,
    )
    return traced.lower(lowering_platforms=("tpu",))


def _lower_prefill(planner: InferencePlanner, rows: int, devices: list) -> jax.stages.Lowered:
    """One part of the prompts, as wide as the engine runs them."""
    given = _engine(planner, "prefill", rows, devices)
    names = ("weights", "tokens", "start", "lengths", "rows", "KV cache", "last", "policy")
    traced = prefill.trace(
        planner.spec.structure,
        *(given[name] for name in names),
        compute_dtype=planner.options.compute_dtype,
    )
    return traced.lower(lowering_platforms=("tpu",))


def _engine(planner: InferencePlanner, step: str, rows: int, devices: list) -> dict[str, Any]:
    """The arguments of a step of the engine, all on one device."""
    where = replicated(build_mesh(MeshConfig(), devices))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), planner.arguments(step, rows)
    )


def _on(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )
