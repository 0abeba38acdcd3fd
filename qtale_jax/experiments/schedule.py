"""Running jobs in worker processes, skipping what is done, showing how far they are."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from qtale_jax.config import resolve
from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.experiments.grid import Job, Step


def stamp(step: Step) -> Path:
    """The file that records what an output was made for."""
    return step.output.parent / f".{step.output.name}.done"


def is_done(step: Step) -> bool:
    """Whether the output is there for the same configuration."""
    return step.output.exists() and stamp(step).exists() and stamp(step).read_text() == step.fingerprint()


def run_step(step: Step) -> None:
    """Runs one stage in this process; its output is replaced if it was made for another configuration.

    Training is not replaced: a folder that holds another run is refused by the stage itself.
    """
    from qtale_jax import calibrate, evaluate, quantize
    from qtale_jax.training.loop import train

    if step.stage != "train" and step.output.is_dir():
        shutil.rmtree(step.output)
    stages = {"quantize": quantize.run_stage, "calibrate": calibrate.run_stage}
    if step.stage == "train":
        train(step.config)
    elif step.stage == "evaluate":
        evaluate.run_stage(step.config, quiet=True)
    else:
        stages[step.stage](step.config, quiet=True)
    stamp(step).write_text(step.fingerprint())


def worker_environment(config: Config, root: Path) -> dict[str, str]:
    """Environment of a worker: its share of the cores, a compilation cache that all workers share."""
    cores, workers = os.cpu_count() or 1, config.experiment.workers
    environment = dict(os.environ)
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str((root / ".compiled").resolve()))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if workers > 1 and cores // workers <= 1:
        # One single-threaded process per core beats several that share their threads (measured on 2 cores).
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def write_job(job: Job, folder: Path) -> Path:
    """Writes a job's steps where its worker reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{job.name.replace(' ', '-')}.yaml"
    steps = [
        {"stage": s.stage, "output": str(s.output), "parent": s.parent, "config": resolve(s.config)} for s in job.steps
    ]
    file.write_text(yaml.safe_dump(steps, sort_keys=False))
    return file


def read_job(file: Path) -> list[Step]:
    """The steps of a job file."""
    return [
        Step(entry["stage"], Config.model_validate(entry["config"]), Path(entry["output"]), entry["parent"])
        for entry in yaml.safe_load(file.read_text())
    ]


class Running:
    """A worker process on one job, with its log."""

    def __init__(self, job: Job, folder: Path, environment: dict[str, str]):
        self.job, self.started = job, time.monotonic()
        file = write_job(job, folder)
        self.log = file.with_suffix(".log")
        command = [sys.executable, "-m", "qtale_jax.experiments.worker", str(file)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent alone, whose SIGTERM lets a worker save
            )

    def last_line(self) -> str:
        """The newest line of the log."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "starting"


def execute_here(jobs: list[Job]) -> None:
    """Runs all jobs that are not done one after the other in this process, which imports and compiles once.

    Raises:
        InputError: a job failed; names it. What is done stays done.
        SystemExit: SIGTERM during training; the state has been saved.
    """
    from qtale_jax.training.loop import Interrupted

    for job in jobs:
        for step in job.steps:
            if is_done(step):
                continue
            try:
                run_step(step)
            except InputError as error:
                raise InputError(f"{job.name} failed: {error}") from error
            except Interrupted as interruption:
                print(interruption, file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM) from interruption


def execute(jobs: list[Job], config: Config) -> None:
    """Runs all jobs that are not done, at most `experiment.workers` at a time, or all in this process.

    Raises:
        InputError: a job failed; names it, its last line and its log. What is done stays done.
    """
    if config.experiment.workers == 0:
        return execute_here(jobs)
    root = Path(config.output)
    done = {job.name for job in jobs if all(is_done(step) for step in job.steps)}
    waiting = [job for job in jobs if job.name not in done]
    environment, folder = worker_environment(config, root), root / "jobs"
    running: list[Running] = []
    finished: dict[str, str] = {name: "done before" for name in sorted(done)}
    console = Console(stderr=True)
    with _signals_as_exit(), Live(console=console, auto_refresh=False, transient=False) as live:
        try:
            while waiting or running:
                for job in [j for j in waiting if set(j.needs) <= set(finished)]:
                    if len(running) < config.experiment.workers:
                        waiting.remove(job)
                        running.append(Running(job, folder, environment))
                        _say(console, f"{job.name}: started, log in {running[-1].log}")
                for worker in [w for w in running if w.process.poll() is not None]:
                    running.remove(worker)
                    if worker.process.returncode:
                        line = worker.last_line()
                        raise InputError(
                            f"{worker.job.name} failed: {line.removeprefix('error: ')} (log: {worker.log})"
                        )
                    finished[worker.job.name] = f"{time.monotonic() - worker.started:.0f} s"
                    _say(console, f"{worker.job.name}: done in {finished[worker.job.name]}")
                if console.is_terminal:
                    live.update(_view(jobs, finished, running), refresh=True)
                time.sleep(0.2)
        finally:
            for worker in running:  # a failure, Ctrl-C or SIGTERM ends the others; they save first where they train
                worker.process.terminate()
            for worker in running:
                worker.process.wait()


@contextlib.contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Turns SIGTERM, and the end of the terminal, into an exception, so that workers are not left behind.

    Only the main thread can. A hangup that is ignored, as under `nohup`, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    ending = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        ending.append(signal.SIGHUP)
    previous = {number: signal.signal(number, leave) for number in ending}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(console: Console, text: str) -> None:
    if not console.is_terminal:
        console.print(text, highlight=False, soft_wrap=True)


def _view(jobs: list[Job], finished: dict[str, str], running: list[Running]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    active = {worker.job.name: worker for worker in running}
    for job in jobs:
        if job.name in finished:
            table.add_row("[green]done", job.name, finished[job.name])
        elif job.name in active:
            worker = active[job.name]
            table.add_row(
                "[yellow]running", job.name, f"{time.monotonic() - worker.started:.0f} s  {worker.last_line()[-100:]}"
            )
        else:
            table.add_row("[dim]waiting", job.name, "")
    return table
