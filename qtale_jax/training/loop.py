"""The training loop, one story from top to bottom: mesh, model, data, step, resume, loop, model directory."""

import functools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qtale_jax.artifact import lineage, save_model
from qtale_jax.config import resolve
from qtale_jax.config.schema import Config
from qtale_jax.data.pipeline import Pipeline, build_pipeline, from_rows, load_rows
from qtale_jax.errors import InputError
from qtale_jax.models.cost import peak_flops, training_flops_per_token
from qtale_jax.models.forward import run_trunk
from qtale_jax.models.lora import merge_lora
from qtale_jax.models.policy import Dense, Thresholded
from qtale_jax.models.stacking import unstack_layers
from qtale_jax.parallel.axes import partition_spec
from qtale_jax.parallel.mesh import build_mesh, replicated, rows_held
from qtale_jax.parallel.processes import check_joined, from_first, is_first, together
from qtale_jax.training import head
from qtale_jax.training.checkpoint import Checkpoints
from qtale_jax.training.identity import check_claim, claim
from qtale_jax.training.lock import held
from qtale_jax.training.logs import flat_numbers, memory_bytes, open_log
from qtale_jax.training.optimizer import build_optimizer, nest
from qtale_jax.training.profiling import StepTrace, compile_step
from qtale_jax.training.start import Start, place_state, prepare, state_shardings
from qtale_jax.training.step import Batch, TrainState, TrainStep
from qtale_jax.training.stopping import Interrupted, RunAhead, stop_signal
from qtale_jax.training.wandb_log import WandbLog, import_wandb


class NonFiniteLoss(InputError):
    """The loss or its gradient stopped being a number."""


def sharded_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> Batch:
    """Puts this process's rows of a batch on the mesh, rows over the data axes."""
    sharding = jax.sharding.NamedSharding(mesh, partition_spec(("batch", "length")))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def build_validation(config: Config, start: Start, mesh: jax.sharding.Mesh):
    """Returns a function (trainable, frozen) -> nats per target token on the validation split at the model's theta.

    The split is read now, so that bad data is refused before training; without held-out data the function gives None.
    """
    spec = start.spec
    policy = Thresholded(jnp.asarray(spec.thresholds, jnp.float32)) if spec.routing else Dense()

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def batch_nats(trainable, frozen, batch):
        params = nest(trainable, frozen)
        hidden, _, _ = run_trunk(
            spec,
            params,
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            policy=policy,
            compute_dtype=jnp.dtype(config.train.compute_dtype),
        )
        given = head.Given(head.needed(params), jnp.ones(()))
        positions = head.Positions(batch["targets"], batch["weights"])
        return head.losses(head.Head(spec), hidden, given, positions, trained=False)[0], jnp.sum(batch["weights"])

    rows = (
        None
        if config.data.held_out == 0 and config.data.evaluation_path is None
        else load_rows(config, start.tokenizer, "validation")
    )

    def validate(trainable, frozen) -> float | None:
        if rows is None:
            return None
        batch_size = config.train.batch_size
        pipeline = from_rows(rows, "validation", batch_size, config.seed, rows_held(mesh, batch_size))
        sums = []
        for _, batch in zip(range(config.train.evaluate_batches), pipeline, strict=False):
            sums.append(batch_nats(trainable, frozen, sharded_batch(mesh, batch)))
        total, count = (sum(float(x) for x in column) for column in zip(*sums, strict=True))
        return total / max(count, 1.0)

    return validate


def pipeline_for(config: Config, start: Start, split: str, mesh: jax.sharding.Mesh) -> Pipeline:
    """The data pipeline of this process."""
    size = config.train.batch_size
    part = rows_held(mesh, size)
    return build_pipeline(config, start.tokenizer, split=split, batch_size=size, part=part, seed=config.seed)


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the whole run, from `train.steps` or from epochs over `rows` training rows."""
    per_epoch = max(1, rows // config.train.batch_size)
    return config.train.steps or max(1, math.ceil(config.train.epochs * per_epoch))


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses what only the machine tells: a microbatch that the data axes do not divide, a tracker that is missing."""
    if config.train.wandb_project is not None and is_first():
        import_wandb()
    check_rows(config, mesh)


def check_rows(config: Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    """Refuses a microbatch that the data axes do not divide."""
    rows, ways = config.train.batch_size // config.train.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise InputError(
            f"train.batch_size / train.microbatches = {rows} rows do not divide over data x fsdp = {ways} devices"
        )


def train(config: Config, *, quiet: bool = False) -> Path:
    """Trains, resuming if `config.output` holds the same run unfinished; returns the model directory.

    Raises:
        InputError: bad input, or another run's output.
        NonFiniteLoss: names the step; the last good checkpoint stays.
        Interrupted: SIGTERM; the state has been saved.
    """
    output = Path(config.output)
    check_joined()
    if from_first("whether it is finished", (output / "trained").exists() and not check_claim(output, config)):
        return output / "trained"
    mesh = build_mesh(config.mesh)
    check(config, mesh)
    key = jax.random.key(config.seed)
    peak_flops()  # measured once, on one device, before the mesh claims them all
    with jax.set_mesh(mesh):
        start = prepare(config, mesh, jax.random.fold_in(key, 1))
        pipeline = pipeline_for(config, start, "train", mesh)
        steps = total_steps(config, pipeline.size)
        trace = StepTrace(config.profile.steps, output / "profile", steps)
        claim(output, config, pipeline.digest)
        with held(output):
            if from_first("whether it was finished meanwhile", (output / "trained").exists()):
                return output / "trained"
            optimizer = build_optimizer(config.train.optimizer, steps)
            state = place_state(start, optimizer, mesh)
            checkpoints = Checkpoints(output / "checkpoints", config.train.keep_checkpoints)
            try:
                saved = checkpoints.restore_newest(state)
                if saved is not None:
                    state, position = saved
                    pipeline.set_state(position)
                with together(Interrupted, NonFiniteLoss):
                    state = run(config, start, mesh, steps, state, pipeline, optimizer, checkpoints, key, quiet, trace)
            finally:  # however the run ends, a checkpoint that is being written is finished
                checkpoints.close()
            write_model(config, start, state, steps)
    return output / "trained"


def run(config, start, mesh, steps, state, pipeline, optimizer, checkpoints, key, quiet, trace) -> TrainState:
    """The loop proper: one compiled step; the host stays ahead of the devices, except where it logs or saves."""
    settings, spec = config.train, start.spec
    teacher = None
    if settings.distillation.active:
        copied = {path: jnp.copy(leaf) for path, leaf in start.trainable.items() if "/lora/" not in path}
        teacher = {path: leaf for path, leaf in start.frozen.items() if "/lora/" not in path} | copied
    step_function = jax.jit(
        TrainStep(spec, config, optimizer, steps),
        donate_argnums=0,
        out_shardings=(state_shardings(start, optimizer, mesh), replicated(mesh)),
    )
    validate = build_validation(config, start, mesh)
    flops, peak = training_flops_per_token(spec, config.data.length), peak_flops()
    done, tokens = int(state.step), 0.0
    clock, since = time.perf_counter(), done
    route_key = jax.random.fold_in(key, 2)
    log, program = open_log(Path(config.output), steps, done, quiet, functools.partial(_wandb, config)), None
    ahead = RunAhead()
    with stop_signal() as stopping, log, trace:
        while done < steps:
            batch = next(pipeline)
            arguments = (state, start.frozen, teacher, sharded_batch(mesh, batch), route_key)
            program = program or compile_step(step_function, arguments, quiet=quiet)
            trace.before(done + 1)
            state, metrics = program(*arguments)
            ahead.dispatched(metrics["loss"])
            done += 1
            trace.after(done, metrics)
            here = len(batch["tokens"]) / settings.batch_size  # the share of the batch that this process has
            tokens += np.count_nonzero(batch["segment_ids"]) / here
            last, stop, validation = done == steps, stopping(done), None
            evaluating = last or (settings.evaluate_every and done % settings.evaluate_every == 0)
            log.advance(done, f"{(done - since) / (time.perf_counter() - clock):.1f} steps/s")
            if done % settings.log_every == 0 or evaluating:
                row = flat_numbers(metrics)
                _refuse_non_finite(int(state.bad_step))
                elapsed = time.perf_counter() - clock
                row |= {
                    "tokens_per_second": tokens / elapsed,
                    "steps_per_second": (done - since) / elapsed,
                    "model_flop_utilization": flops * tokens / elapsed / peak,
                    "memory_bytes": memory_bytes(),
                }
                if evaluating:
                    validation = row["validation"] = validate(state.trainable, start.frozen)
                log.write(done, row)
                clock, since, tokens = time.perf_counter(), done, 0.0
            if done % settings.checkpoint_every == 0 or last or stop:
                _refuse_non_finite(int(state.bad_step))
                checkpoints.save(done, state, pipeline.get_state(), validation)
            if stop and not last:
                raise Interrupted(f"SIGTERM: saved after step {done} of {steps}; the same command continues")
    return state


def _wandb(config: Config) -> WandbLog | None:
    """The W&B run that is logged to, if any."""
    if config.train.wandb_project is None:
        return None
    return WandbLog(Path(config.output), config.train.wandb_project, resolve(config))


def _refuse_non_finite(bad_step: int) -> None:
    if bad_step >= 0:
        raise NonFiniteLoss(
            f"the loss of step {bad_step + 1} is not finite; the checkpoint before it is kept. "
            "Try a lower train.optimizer.learning_rate or train.optimizer.clip"
        )


def write_model(config: Config, start: Start, state: TrainState, steps: int) -> None:
    """Writes OUTPUT/trained: one tree per layer, storage types restored, adapters merged unless asked otherwise."""
    spec = start.spec
    dtype = jnp.dtype(spec.dtype)
    trained = {
        path: leaf.astype(dtype) if path.endswith(("kernel", "table")) and "/router/" not in path else leaf
        for path, leaf in state.trainable.items()
    }
    params = unstack_layers(spec, nest(trained, start.frozen))
    if config.train.merge_lora:
        spec, params = merge_lora(spec, params)
    settings = {name: section for name, section in resolve(config).items() if name != "distributed"}
    facts = {"config": settings, "seed": config.seed, "steps": steps}
    if config.model.path is None:
        provenance = {"stage": "train", "parent": None, **facts}
    else:
        provenance = lineage("train", config.model.path, start.inherited, **facts)
    save_model(Path(config.output) / "trained", spec, params, tokenizer=start.tokenizer, provenance=provenance)
