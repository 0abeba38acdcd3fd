"""Bytes of the KV cache by executed ratio: a random Llama of about 134 million parameters, 512 + 64 tokens.

    python benchmarks/kv_memory.py --output benchmarks/results/kv_memory_cpu.json

Counted over all arrays of the cache at the end, tables and spare pages included. The baseline is the masked engine's
cache, which has a slot for every token.
"""

import jax
import jax.numpy as jnp
from harness import Row, parser, report
from random_llama import choice, executed, generation, model

from qtale_jax.inference.generation import empty_caches
from qtale_jax.inference.growth import LEAST_STEP
from qtale_jax.models.cache import cache_bytes

PROMPT, NEW = 512, 64


def main() -> None:
    """Counts, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    choice(arguments)
    arguments.add_argument("--length", type=int, default=PROMPT, help="tokens of the prompt (default 512)")
    found = arguments.parse_args()
    spec, params = model(found.layers, name=found.model)
    dense = cache_bytes(jax.eval_shape(lambda: empty_caches(spec, 1, found.length + NEW, jnp.dtype(spec.dtype))))
    rows = [Row("masked", dense / 1e6, "MB", "masked", 1.0)]
    for ratio in (1.0, 0.75, 0.5, 0.25):
        out = generation(spec, params, ratio, 1, found.length, NEW, least_step=LEAST_STEP)()
        name = f"ratio {ratio:g}, executed {executed(out):.3f}"
        rows.append(Row(name, out.held_bytes / 1e6, "MB", "masked", dense / out.held_bytes))
    report("kv_memory", rows, found.output)


if __name__ == "__main__":
    main()
