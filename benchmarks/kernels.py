"""Products of few rows with stored weights, and attention to pages, at the shapes of LLaMA-2-7B: Pallas against XLA.

    python benchmarks/kernels.py --output FILE                        on a TPU or GPU: times (`--shapes`, `--formats`)
    python benchmarks/kernels.py --topology v5e:2x2 --output FILE     anywhere, with libtpu: what the compiler counts

Times are those of several products one after another, each with a matrix of its own, so that nothing is read twice.
Counted are the bytes that a program has to move at least: arguments and results once, temporary arrays twice.
"restored" is what the plain form is not: the matrix restored as a whole, then multiplied.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from harness import Row, in_turns, parser, report
from jax.sharding import SingleDeviceSharding

from qtale_jax.inference.paged_attention import Fresh, Kept, attend_pages
from qtale_jax.inference.pages import PAGE, Pool
from qtale_jax.inference.pages import stored as stored_vectors
from qtale_jax.models.specification import Kernels, TensorFormat
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
"""Matrices that follow one another: more than any cache holds."""

TURNS = 16
"""Times that a program goes through them: what it costs to start it is nothing beside that."""

KEPT = (512, 4096)
"""Tokens that a row keeps, of attention."""


def restored(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """The product with a matrix that is restored as a whole."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(rows, weight.dequantize(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def forms(stored: dict[str, Any], shape: tuple[int, int], format: TensorFormat) -> dict[str, tuple[Callable, Any]]:
    """Functions of rows and weight, and the weight, by name."""
    plain = QuantizedWeight(**stored, format=format, shape=shape, kernels="xla")
    kernel = dataclasses.replace(plain, kernels="pallas")
    return {"restored": (restored, plain), "xla": (linear, plain), "pallas": (linear, kernel)}


def compiled_bytes(topology: str, rows: int) -> list[Row]:
    """What one product moves at least, by the compiler's memory analysis."""
    from qtale_jax.planning.compiled import topology_devices

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


def measured_times(rows: int, rounds: int, shapes: Iterable[str], formats: Iterable[str]) -> list[Row]:
    """Microseconds of one product on the device that is here."""
    found, key = [], jax.random.key(0)
    for name in shapes:
        shape = SHAPES[name]
        x = jax.random.normal(key, (rows, 1, shape[0]), jnp.bfloat16)
        matrices = [jax.random.normal(part, shape, jnp.bfloat16) for part in jax.random.split(key, REPEATS)]
        title = f"{name}, {rows} rows, bfloat16"
        candidates = {title: functools.partial(repeated(linear), x, matrices)}
        for label in formats:
            format = FORMATS[label]
            many = [jax.jit(store, static_argnums=1)(matrix.astype(jnp.float32), format) for matrix in matrices]
            for form, (function, _) in forms(many[0], shape, format).items():
                weights = [forms(stored, shape, format)[form][1] for stored in many]
                candidates[f"{name}, {rows} rows, {label}, {form}"] = functools.partial(repeated(function), x, weights)
        times = in_turns(candidates, rounds)
        for label, seconds in times.items():
            found.append(Row(label, 1e6 * seconds / REPEATS / TURNS, "us", "bfloat16", times[title] / seconds))
    return found


def repeated(function: Callable) -> Callable:
    """The products of rows with several weights, again and again; the rows depend on what came before."""

    @jax.jit
    def run(x: jax.Array, weights: list) -> jax.Array:
        def turn(_: Any, x: jax.Array) -> jax.Array:
            largest = [jnp.max(function(x, weight)) for weight in weights]
            return x + jnp.max(jnp.stack(largest)).astype(x.dtype) * jnp.asarray(1e-9, x.dtype)

        return jax.lax.fori_loop(0, TURNS, turn, x)

    return run


def measured_attention(rows: int, rounds: int) -> list[Row]:
    """Microseconds of one query per row that attends to its pages, 32 heads of 128."""
    found, width, heads = [], 128, 32
    for kept in KEPT:
        count = rows * kept // PAGE
        for label, dtype, groups in (("bfloat16", jnp.bfloat16, 32), ("int8", jnp.int8, 8)):
            keys = jax.random.split(jax.random.key(rows), 4)
            query, *own = (
                jax.random.normal(part, (rows, 1, size, width), jnp.bfloat16)
                for part, size in zip(keys, (heads, groups, groups), strict=False)
            )
            at = jnp.full((rows, 1), kept, jnp.int32)
            order = jax.random.permutation(keys[3], count).astype(jnp.int32).reshape(rows, -1)
            caches = []
            for part in jax.random.split(keys[3], REPEATS):
                pool = (jax.random.normal(each, (count, PAGE, groups, width), jnp.bfloat16) for each in (part, keys[0]))
                pages = Pool(*(stored_vectors(x, jnp.dtype(dtype)) for x in pool), jnp.zeros((count, PAGE), jnp.int32))
                caches.append(Kept(pages, order, jnp.full((rows,), kept - 3, jnp.int32)))
            fresh = Fresh(*own, at, jnp.ones((rows, 1), bool))

            def attend(kernels: Kernels, query: jax.Array, cache: Kept, at=at, fresh=fresh) -> jax.Array:
                return attend_pages(query, at, fresh, cache, kernels=kernels)

            name = f"attention, {rows} rows, {kept} kept, {groups} KV heads, {label}"
            choices: tuple[Kernels, ...] = ("xla", "pallas")
            times = in_turns(
                {form: functools.partial(repeated(functools.partial(attend, form)), query, caches) for form in choices},
                rounds,
            )
            for form in choices:
                value = 1e6 * times[form] / REPEATS / TURNS
                found.append(Row(f"{name}, {form}", value, "us", "xla", times["xla"] / times[form]))
    return found


def main() -> None:
    """Measures or counts, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--topology", help="compile for this TPU topology, v5e:2x2 for example, and count bytes")
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="products to time")
    arguments.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="formats to time")
    chosen = arguments.parse_args()
    if chosen.topology is None and jax.default_backend() not in ("tpu", "gpu"):
        arguments.error("no TPU or GPU here; with libtpu, --topology v5e:2x2 compiles for a TPU and counts bytes")
    found = []
    for rows in (1, 16) if chosen.topology else (1, 4, 16):
        if chosen.topology:
            found += compiled_bytes(chosen.topology, rows)
        else:
            found += measured_times(rows, chosen.rounds, chosen.shapes, chosen.formats)
    for rows in () if chosen.topology else (1, 16):
        found += measured_attention(rows, chosen.rounds)
    report(f"kernels{', compiled for ' + chosen.topology if chosen.topology else ''}", found, chosen.output)


if __name__ == "__main__":
    main()
