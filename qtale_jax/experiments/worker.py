"""`python -m qtale_jax.experiments.worker JOB.yaml`: the steps of one job, in one process."""

import sys
from pathlib import Path

from qtale_jax.command import run


def main() -> int:
    """Runs the steps that are not done; prints one line per step. Returns 1 when it was told to stop."""
    from qtale_jax.experiments.schedule import is_done, read_job, run_step
    from qtale_jax.training.loop import Interrupted

    steps = read_job(Path(sys.argv[1]))
    for index, step in enumerate(steps, 1):
        print(f"{step.stage} {index}/{len(steps)}: {step.output}", flush=True)
        try:
            if not is_done(step):
                run_step(step)
        except Interrupted as interruption:
            print(interruption)
            return 1
    return 0


if __name__ == "__main__":
    run(main, repeats=True)
