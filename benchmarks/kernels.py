"""Products of few rows with stored weights on TPUs, at the shapes of LLaMA-2-7B: Pallas kernels, XLA, and bfloat16.

    python benchmarks/kernels.py --output FILE                        on a TPU: times
    python benchmarks/kernels.py --topology v5e:2x2 --output FILE     anywhere, with libtpu: what the compiler counts

Times are those of eight products one after another, each with a matrix of its own, so that nothing is read twice.
Counted are the bytes that a program has to move at least: arguments and results once, temporary arrays twice.
"restored" is what the plain form is not: the matrix restored as a whole, then multiplied.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from harness import Row, in_turns, parser, report
from jax.sharding import SingleDeviceSharding

from qtale_jax.models.specification import TensorFormat
from qtale_jax.planning.compiled import topology_devices
from qtale_jax.quantization.linear import QuantizedWeight, linear
from qtale_jax.quantization.storage import abstract, store

SHAPES = {"query": (4096, 4096), "up": (4096, 11008), "down": (11008, 4096)}

FORMATS = {
    "int8 per channel": TensorFormat(bits=8, symmetric=True),
    "int8 g128": TensorFormat(bits=8, group_size=128, scale_dtype="bfloat16"),
    "int4 g128": TensorFormat(bits=4, group_size=128, scale_dtype="bfloat16"),
    "int3 g128": TensorFormat(bits=3, group_size=128, scale_dtype="bfloat16"),
    "int2 g64": TensorFormat(bits=2, group_size=64, scale_dtype="bfloat16"),
}

REPEATS = 8


def restored(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """The product with a matrix that is restored as a whole."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(rows, weight.dequantize(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def forms(stored: dict[str, Any], shape: tuple[int, int], format: TensorFormat) -> dict[str, tuple[Callable, Any]]:
    """Functions of rows and weight, and the weight, by name."""
    plain = QuantizedWeight(**stored, format=format, shape=shape)
    kernel = dataclasses.replace(plain, kernels="pallas")
    return {"restored": (restored, plain), "xla": (linear, plain), "pallas": (linear, kernel)}


def compiled_bytes(topology: str, rows: int) -> list[Row]:
    """What one product moves at least, by the compiler's memory analysis."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(topology_devices(topology)[0]))

    def moved(function: Callable, x: Any, weight: Any) -> float:
        program = jax.jit(function).trace(x, weight).lower(lowering_platforms=("tpu",)).compile()
        memory: Any = program.memory_analysis()
        once = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return (once + 2 * memory.temp_size_in_bytes) / 1e6

    found = []
    for name, shape in SHAPES.items():
        x = array((rows, 1, shape[0]), jnp.bfloat16)
        dense = moved(linear, x, array(shape, jnp.bfloat16))
        found.append(Row(f"{name}, {rows} rows, bfloat16", dense, "MB"))
        for title, format in FORMATS.items():
            stored = {part: array(leaf.shape, leaf.dtype) for part, leaf in abstract(shape, format).items()}
            for form, (function, weight) in forms(stored, shape, format).items():
                value = moved(function, x, weight)
                found.append(Row(f"{name}, {rows} rows, {title}, {form}", value, "MB", "bfloat16", dense / value))
    return found


def measured_times(rows: int, rounds: int) -> list[Row]:
    """Microseconds of one product on the device that is here."""
    candidates, key = {}, jax.random.key(0)
    for name, shape in SHAPES.items():
        x = jnp.ones((rows, 1, shape[0]), jnp.bfloat16)
        matrix = jax.random.normal(key, shape, jnp.float32)
        many = [matrix.astype(jnp.bfloat16) + number for number in range(REPEATS)]
        candidates[f"{name}, {rows} rows, bfloat16"] = functools.partial(each(linear), x, many)
        for title, format in FORMATS.items():
            stored = jax.jit(store, static_argnums=1)(matrix, format)
            copies = [forms(jax.tree.map(jnp.copy, stored), shape, format) for _ in range(REPEATS)]
            for form, (function, _) in copies[0].items():
                run = functools.partial(each(function), x, [copy[form][1] for copy in copies])
                candidates[f"{name}, {rows} rows, {title}, {form}"] = run
    found = []
    times = in_turns(candidates, rounds)
    for label, seconds in times.items():
        name = label.split(",")[0]
        dense = times[f"{name}, {rows} rows, bfloat16"]
        found.append(Row(label, 1e6 * seconds / REPEATS, "us", "bfloat16", dense / seconds))
    return found


def each(function: Callable) -> Callable:
    """The products of the same rows with several weights."""
    return jax.jit(lambda x, weights: [function(x, weight) for weight in weights])


def main() -> None:
    """Measures or counts, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--topology", help="compile for this TPU topology, v5e:2x2 for example, and count bytes")
    chosen = arguments.parse_args()
    if chosen.topology is None and jax.default_backend() != "tpu":
        arguments.error("no TPU here; with libtpu, --topology v5e:2x2 compiles for one and counts bytes")
    found = []
    for rows in (1, 16):
        found += compiled_bytes(chosen.topology, rows) if chosen.topology else measured_times(rows, chosen.rounds)
    report(f"kernels{', compiled for ' + chosen.topology if chosen.topology else ''}", found, chosen.output)


if __name__ == "__main__":
    main()
