"""What a training step takes: a summary of its compiled program, and a trace of some steps."""

import sys
import time
from pathlib import Path
from typing import Any, Self

import jax

from qtale_jax.errors import InputError
from qtale_jax.parallel.processes import is_first


def compile_step(step: Any, arguments: tuple, *, quiet: bool) -> jax.stages.Compiled:
    """Compiles a jitted step for its first arguments; the first process says how long it took and what it holds.

    The program takes arguments of these shapes and shardings only: nothing can be compiled again unnoticed.
    """
    start = time.perf_counter()
    program = step.lower(*arguments).compile()
    if is_first() and not quiet:
        print(_summary(time.perf_counter() - start, program), file=sys.stderr, flush=True)
    return program


def _summary(seconds: float, program: jax.stages.Compiled) -> str:
    said = f"the step was compiled in {seconds:.1f} s"
    memory: Any = program.memory_analysis()  # not every backend tells
    if memory is None:
        return said
    held, temporary = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    return f"{said}; per device {held:,.1f} MB of state and batch, {temporary:,.1f} MB of temporary arrays"


class StepTrace:
    """Traces the steps from `first` to `last`, those included, into a folder; without steps it does nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, total: int):
        """Takes the steps, the folder and the number of the run's last step.

        Raises:
            InputError: the first step to trace is beyond the last.
        """
        if steps is not None and steps[0] > total:
            raise InputError(f"profile.steps=[{steps[0]}, {steps[1]}] begins after the last step, {total}")
        self._steps, self._folder, self._running = steps, folder, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception) -> None:
        if self._running:
            self._end()

    def before(self, step: int) -> None:
        """Starts where `step` is the first one, or one of them after a resume."""
        if self._steps is not None and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Ends where `step` was the last one, when its result is there."""
        if self._running and self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(result)
            self._end()

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        if is_first():
            print(f"profile: {self._folder}", file=sys.stderr, flush=True)
