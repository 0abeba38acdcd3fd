"""Speed of a routed LoRA training step, against this machine's own matrix products, and what depth costs in compiling.

    python benchmarks/train.py --rounds 21 --output benchmarks/results/train_cpu.json

Utilisation: FLOPs of the matrix products that a step needs, forward and backward (no gradients of frozen weights,
nothing computed again), per second, over the rate of a float32 product of 1024 x 1024 matrices in the same run. Freed
memory is kept, as `python -m qtale_jax.train` does on CPUs.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from harness import Row, each_round, parser, report

from qtale_jax.allocator import keep_freed_memory
from qtale_jax.config.schema import Config
from qtale_jax.parallel.mesh import build_mesh
from qtale_jax.planning.step import StepShapes
from qtale_jax.training.loop import sharded_batch
from qtale_jax.training.optimizer import build_optimizer
from qtale_jax.training.start import place_state, prepare
from qtale_jax.training.step import TrainStep

SIDE = 1024
HUNDRED_MILLION = {"hidden_size": 768, "intermediate_size": 2048, "num_layers": 12, "num_heads": 12}
SMALLER = {"hidden_size": 512, "intermediate_size": 1376, "num_layers": 8, "num_heads": 8}


def configuration(shape: dict[str, int], rows: int, length: int) -> Config:
    """QTALE with adapters on a random Llama."""
    return Config.model_validate(
        {
            "model": {"architecture": {**shape, "vocab_size": 32000, "max_length": length}},
            "data": {"length": length},
            "train": {"batch_size": rows, "parameters": "adapters", "steps": 100},
            "mesh": {"data": 1},
        }
    )


class Step:
    """A training step that is called again and again on one batch."""

    def __init__(self, config: Config):
        rows, length = config.train.batch_size, config.data.length
        mesh = build_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            self.start = prepare(config, mesh, jax.random.key(0))
            optimizer = build_optimizer(config.train.optimizer, 100)
            self.state = place_state(self.start, optimizer, mesh)
            ids = np.random.default_rng(0).integers(3, 32000, (rows, length)).astype(np.int32)
            ones = np.ones((rows, length), np.int32)
            batch = {"tokens": ids, "targets": np.roll(ids, -1, 1), "weights": ones.astype(np.float32)}
            self._batch = sharded_batch(mesh, batch | {"segment_ids": ones})
            step = jax.jit(TrainStep(self.start.spec, config, optimizer, 100), donate_argnums=0)
            lowered = step.lower(self.state, self.start.frozen, None, self._batch, jax.random.key(1))
            since = time.perf_counter()
            self._compiled = lowered.compile()
            self.compile_seconds = time.perf_counter() - since
        self.tokens = rows * length
        self.flops = StepShapes(config, self.start.spec, 1).products(rows).flops
        self.parameters = sum(leaf.size for leaf in [*self.start.trainable.values(), *self.start.frozen.values()])

    def __call__(self) -> jax.Array:
        """Takes a step; returns its loss."""
        self.state, metrics = self._compiled(self.state, self.start.frozen, None, self._batch, jax.random.key(1))
        return metrics["loss"]


def speeds(rounds: int) -> list[Row]:
    """Tokens per second and utilisation of both models."""
    steps = {
        "100 M, 12 layers, d 768, 4 x 256": Step(configuration(HUNDRED_MILLION, 4, 256)),
        "8 layers, d 512, 4 x 256": Step(configuration(SMALLER, 4, 256)),
    }
    matrix = jnp.ones((SIDE, SIDE), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    times = each_round({"product": lambda: [multiply(matrix, matrix) for _ in range(8)][-1], **steps}, rounds)
    rate = 8 * 2 * SIDE**3 / times["product"]
    rows = [Row("float32 matrix product", float(np.median(rate)) / 1e9, "GFLOP/s")]
    for name, step in steps.items():
        # Ratios within a round, then their median: a slow spell of the machine hits both sides of a ratio.
        used = step.flops / times[name]
        utilisation = float(np.median(used / rate))
        speed = step.tokens / float(np.median(times[name]))
        rows.append(Row(f"{name} ({step.parameters / 1e6:.0f} M)", speed, "tokens/s"))
        rows.append(
            Row(f"{name}, products", float(np.median(used)) / 1e9, "GFLOP/s", "float32 matrix product", utilisation)
        )
    return rows


def compiling() -> list[Row]:
    """Seconds of compiling 8 and 32 layers, which one scan runs."""
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_heads": 4}
    found = {n: Step(configuration({**shape, "num_layers": n}, 2, 64)).compile_seconds for n in (8, 32)}
    return [
        Row("compiling 8 layers", found[8], "s"),
        Row("compiling 32 layers", found[32], "s", "compiling 8 layers", found[8] / found[32]),
    ]


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    keep_freed_memory()
    report("train", [*speeds(arguments.rounds), *compiling()], arguments.output)


if __name__ == "__main__":
    main()
