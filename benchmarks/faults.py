"""Faults at random times in training and quantizing: what is lost, and whether what is resumed is what would have been.

    mount -t tmpfs -o size=64m none SMALL
    python benchmarks/faults.py --faults 200 --folder SMALL --output benchmarks/results/faults_cpu.json

A tiny model is trained, and quantized, again and again by the commands that users give, each stopped by a fault and
started again until it is finished. Then its files have to be those of one undisturbed run, bit for bit. Without a small
file system to fill up, the disk is not filled.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from harness import Row, parser, report
from rich.console import Console
from rich.progress import track

from qtale_jax.artifact import load_model
from qtale_jax.artifact.arrays import flatten

STEPS, EVERY = 120, 3
SMALL = 2**30
"""Bytes of a file system that may be filled up."""
MEASURED = {"tokens_per_second", "steps_per_second", "model_flop_utilization", "memory_bytes"}


def settings(folder: Path) -> dict:
    """A routed model of three layers on sums."""
    rng = random.Random(0)
    sums = [(rng.randrange(15), rng.randrange(15)) for _ in range(80)]
    rows = [{"query": f"sum : {a} {b} =", "choices": [str(a + b), str(a + b + 1)], "gold": 0} for a, b in sums]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 3, "num_heads": 4, "max_length": 16}
    return {
        "data": {"kind": "multiple_choice", "path": str(folder / "sums.jsonl"), "length": 12, "held_out": 0.2},
        "model": {"architecture": shape | {"vocab_size": 60}},
        "routing": {"router_hidden": 8, "always_on_layers": 1, "always_on_tokens": 1},
        "lora": None,
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "parameters": "all",
            "log_every": 1,
            "checkpoint_every": EVERY,
            "evaluate_batches": 1,
        },
        "quantize": {"bits": 4, "group_size": 8, "method": "gptq", "statistics": {"examples": 6}},
    }


class Wrong(Exception):
    """A promise was broken."""


def expect(holds: bool, message: str) -> None:
    """Raises `Wrong` unless it holds."""
    if not holds:
        raise Wrong(message)


class Stage:
    """A stage in a folder of its own, which is stopped and started again until its result is there."""

    def __init__(self, name: str, config: dict, folder: Path, result: str):
        self.folder, self.result = folder, folder / result
        folder.mkdir(parents=True)
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        # Not in the folder, whose file system is filled up.
        handle, name_of_log = tempfile.mkstemp(prefix="qtale-jax-stderr-")
        os.close(handle)
        self.log = Path(name_of_log)
        self.command = [sys.executable, "-m", f"qtale_jax.{name}", str(file)]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.exists()

    def start(self) -> subprocess.Popen:
        """The process of the stage."""
        with self.log.open("w") as log:
            return subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)

    def said(self) -> str:
        """What it printed to stderr."""
        return self.log.read_text(errors="replace")

    def check_end(self, code: int, allowed: tuple[int, ...]) -> None:
        """One line for an error, whatever happened, and a code that says what it was."""
        expect(code in allowed, f"exit code {code}, expected one of {allowed}: {self.said()[-500:]}")
        expect("Traceback" not in self.said(), f"a traceback: {self.said()[-1500:]}")

    def values(self) -> dict[str, bytes]:
        """Every array of the result."""
        return {name: np.asarray(leaf).tobytes() for name, leaf in flatten(load_model(self.result).params).items()}


class Training(Stage):
    """A training, with what it says of its steps."""

    def __init__(self, config: dict, folder: Path):
        super().__init__("train", config | {"output": str(folder / "run")}, folder, "run/trained")
        self.checkpoints = folder / "run" / "checkpoints"
        self.most_lost = 0
        self._before: tuple[list[int], int] = ([], 0)

    def whole(self) -> list[int]:
        """Steps of the checkpoints that are not being written."""
        found = self.checkpoints.iterdir() if self.checkpoints.exists() else ()
        return sorted(int(path.name) for path in found if path.name.isdigit())

    def logged(self) -> list[dict]:
        """Rows of the log; the last one may have been cut by the end of the process."""
        file = self.folder / "run" / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            return [json.loads(line) for line in lines[:-1]]

    def steps(self) -> list[int]:
        """Steps that the running process has reported."""
        lines = [line.split()[1] for line in self.said().splitlines() if line.startswith("step ")]
        return [int(step.split("/")[0]) for step in lines if "/" in step]

    def start(self) -> subprocess.Popen:
        """The process, after a note of where it should continue."""
        rows = self.logged()
        self._before = (self.whole(), rows[-1]["step"] if rows else 0)
        return super().start()

    def check_start(self, damaged: bool) -> None:
        """What was resumed is the newest checkpoint, or the one before it if that was damaged; nothing else is lost."""
        whole, logged = self._before
        steps = self.steps()
        if not steps:
            return  # it did not come to a step
        resumed, allowed = steps[0] - 1, {whole[-1] if whole else 0}
        if damaged:
            allowed.add(whole[-2])
        expect(resumed in allowed, f"resumed after step {resumed}, expected one of {allowed}")
        if damaged and resumed == whole[-2]:
            expect("the checkpoint before it is used" in self.said(), "a damaged checkpoint was skipped silently")
        self.most_lost = max(self.most_lost, logged - resumed)
        # One interval, and what was trained while the checkpoint at its end was being written: less than another.
        expect(logged - resumed <= (3 if damaged else 2) * EVERY, f"{logged - resumed} steps were lost")


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], limit: float = 120.0) -> None:
    """Returns when the condition holds or the process has ended."""
    end = time.monotonic() + limit
    while process.poll() is None and not condition() and time.monotonic() < end:
        time.sleep(0.002)


def some_moment(stage: Stage, process: subprocess.Popen, rng: random.Random) -> None:
    """Waits: for some time of the start or, if it trains, for some step and a little more."""
    if isinstance(stage, Training) and rng.random() < 0.7:
        step = rng.randint(max([0, *stage.whole()]) + 1, STEPS)
        wait_for(process, lambda: stage.steps()[-1:] >= [step])
        time.sleep(rng.uniform(0, 0.05))
    else:
        end = time.monotonic() + rng.uniform(0, 10)
        wait_for(process, lambda: time.monotonic() >= end)


def stopped(stage: Stage, number: signal.Signals, rng: random.Random, damaged: bool, writing: bool = False) -> None:
    """The process gets a signal at some moment, or while a checkpoint has its temporary name."""
    process = stage.start()
    if writing and isinstance(stage, Training):
        folder = stage.checkpoints
        wait_for(process, lambda: folder.exists() and any(not p.name.isdigit() for p in folder.iterdir()))
    else:
        some_moment(stage, process, rng)
    process.send_signal(number)
    process.wait()
    # SIGTERM before there is anything to save ends a process as it does any other.
    stage.check_end(process.returncode, (0, -number))
    if isinstance(stage, Training):
        stage.check_start(damaged)
        if "SIGTERM: saved after step" in stage.said():
            saved = int(stage.said().split("saved after step ")[1].split()[0])
            expect(saved in stage.whole(), f"step {saved} was said to be saved")


def full_disk(stage: Stage, rng: random.Random, damaged: bool) -> None:
    """The file system has little room left while the process runs."""
    filler = stage.folder / "filler"
    with filler.open("wb") as file:
        left = shutil.disk_usage(stage.folder).free - rng.randrange(300_000)
        os.posix_fallocate(file.fileno(), 0, max(left, 1))
    process = stage.start()
    process.wait()
    filler.unlink()
    stage.check_end(process.returncode, (0, 2))
    expect(process.returncode == 0 or "error: " in stage.said(), "no error was printed")
    if isinstance(stage, Training):
        stage.check_start(damaged)


def damage(folder: Path, kind: str, rng: random.Random) -> None:
    """Harms a file of a checkpoint."""
    file = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size])
    content = bytearray(file.read_bytes())
    if kind == "deleted":
        file.unlink()
        return
    if kind == "emptied":
        content.clear()
    elif kind == "truncated":
        del content[rng.randrange(len(content)) :]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
DAMAGES = ("truncated", "emptied", "bit flipped", "deleted")


class Campaign:
    """Faults one after the other, over as many runs as they last for."""

    def __init__(self, root: Path, seed: int):
        self.root, self.rng, self.counts, self.runs, self.most_lost = root, random.Random(seed), Counter(), 0, 0
        self.fills = shutil.disk_usage(root).total < SMALL
        self.config = settings(root)
        reference = Training(self.config, root / "reference")
        self.finish(reference)
        self.expected = {"train": (reference.values(), self.rows(reference))}
        self.quantizing = {"quantize": self.config["quantize"] | {"model": str(reference.result)}}
        quantized = self.new_quantization("reference-quantized")
        self.finish(quantized)
        self.expected["quantize"] = (quantized.values(), [])
        self.stages: dict[str, Stage] = {}
        self.damaged, self.latest = False, ""

    def new_quantization(self, name: str) -> Stage:
        """A quantization of the reference."""
        folder = self.root / name
        section = self.quantizing["quantize"] | {"output": str(folder / "quantized")}
        return Stage("quantize", self.config | {"quantize": section}, folder, "quantized")

    @staticmethod
    def rows(stage: Stage) -> list[dict]:
        """The log without what depends on the machine's mood."""
        found = stage.logged() if isinstance(stage, Training) else []
        return [{name: value for name, value in row.items() if name not in MEASURED} for row in found]

    def finish(self, stage: Stage) -> None:
        """Runs the stage to its end."""
        code = stage.start().wait()
        stage.check_end(code, (0,))

    def stage(self, kind: str) -> Stage:
        """The stage that is under way, or a new one."""
        if kind not in self.stages:
            self.runs += 1
            name = f"{kind}-{self.runs}"
            self.stages[kind] = (
                Training(self.config, self.root / name) if kind == "train" else self.new_quantization(name)
            )
        return self.stages[kind]

    def settle(self, kind: str) -> None:
        """Compares a stage that is finished with the undisturbed one, and lets it go."""
        stage = self.stages[kind]
        if not stage.finished:
            return
        values, rows = self.expected[kind]
        expect(stage.values() == values, f"{stage.folder}: the result is not that of an undisturbed run")
        expect(self.rows(stage) == rows, f"{stage.folder}: the log is not that of an undisturbed run")
        if isinstance(stage, Training):
            self.most_lost = max(self.most_lost, stage.most_lost)
        shutil.rmtree(stage.folder)
        stage.log.unlink()
        del self.stages[kind]

    def fault(self) -> None:
        """One fault, and what has to hold after it."""
        kind = "quantize" if self.rng.random() < 0.15 else "train"
        stage = self.stage(kind)
        names = [*SIGNALS, *(["disk full"] if self.fills else [])]
        if isinstance(stage, Training):
            names += ["SIGKILL while saving", *(DAMAGES if len(stage.whole()) > 1 and not self.damaged else ())]
        name = self.rng.choice(names)
        self.latest = f"{name}, {kind}"
        self.counts[self.latest] += 1
        if name in DAMAGES and isinstance(stage, Training):
            damage(stage.checkpoints / str(stage.whole()[-1]), name, self.rng)
            self.damaged = True
            return
        damaged, self.damaged = self.damaged and kind == "train", self.damaged and kind != "train"
        if name == "disk full":
            full_disk(stage, self.rng, damaged)
        else:
            stopped(stage, SIGNALS[name.split()[0]], self.rng, damaged, "saving" in name)
        if damaged and isinstance(stage, Training) and not stage.steps():
            self.damaged = stage.whole() == stage._before[0]  # it did not come to looking at the checkpoint
        self.settle(kind)

    def end(self) -> None:
        """Finishes what is under way."""
        for kind in list(self.stages):
            self.finish(self.stages[kind])
            self.settle(kind)


def main() -> None:
    """Injects, checks, prints and writes; the first broken promise ends it with its reason."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--faults", type=int, default=20, help="how many (default 20)")
    arguments.add_argument("--seed", type=int, default=0, help="of their kinds and times")
    arguments.add_argument("--folder", type=Path, help="where; below 1 GB of file system, it is filled up as well")
    found = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=found.folder) as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="qtale-jax-compiled-"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        campaign = Campaign(Path(folder), found.seed)
        for number in track(range(found.faults), description="faults", console=Console(stderr=True)):
            try:
                campaign.fault()
            except Wrong as error:
                raise SystemExit(f"fault {number + 1} ({campaign.latest}): {error}") from error
        campaign.end()
    rows = [Row(name, count, "faults") for name, count in sorted(campaign.counts.items())]
    rows.append(Row("runs that ended as an undisturbed one, bit for bit", campaign.runs, "runs"))
    lost = campaign.most_lost
    rows.append(Row("most steps lost at once", lost, "steps", f"checkpoint every {EVERY} steps", lost / EVERY))
    report("faults", rows, found.output)


if __name__ == "__main__":
    main()
