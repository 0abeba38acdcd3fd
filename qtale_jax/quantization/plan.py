"""What a quantization will take, before it starts: memory by what needs it, and time.

Memory is counted from shapes: what is held while a layer is worked on, and the largest of the steps' working sets. Time
is arithmetic over a rate that was just measured (on CPUs) or is a share of the data sheet's (on accelerators).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.models.cost import layer_flops, peak_flops
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.specification import ModelSpecification, TensorFormat
from qtale_jax.quantization.memory import resident_bytes
from qtale_jax.quantization.scaling import READERS
from qtale_jax.quantization.storage import array_bytes

PROGRAMS = {"rtn": 150, "awq": 440, "gptq": 530, "magr": 440, "magr+gptq": 560}
"""MiB that the compiler and its programs take in host memory, by method; on a CPU, the same from 0.3 to 100 million
parameters within a tenth (`benchmarks/quantize_memory.py`)."""

WRITING = 2.7
"""What writing an array holds at its peak, in sizes of the array: the array, Orbax's copy, and buffers."""

UTILISATION = 0.4
"""Share of the measured or published matmul rate that the large products reach."""


@dataclass(frozen=True)
class Plan:
    """Bytes by what needs them (their sum is the expected peak), and expected seconds."""

    memory: dict[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        """Expected peak: host memory of the process on a CPU; on an accelerator its memory, without the process."""
        return sum(self.memory.values())


def plan(
    spec: ModelSpecification,
    formats: dict[str, TensorFormat],
    config: QuantizeConfig,
    shape: tuple[int, int] | None,
    compute_dtype: jnp.dtype,
) -> Plan:
    """Plans a quantization.

    Args:
        spec: the model in floating point.
        formats: of its matrices.
        config: method and settings.
        shape: (rows, length) of the calibration data; None without.
        compute_dtype: type of the hidden states.
    """
    abstract = abstract_parameters(spec)
    layers = abstract["layers"].values()
    layer = max(sum(map(array_bytes, jax.tree.leaves(tree))) for tree in layers)
    ends = max(array_bytes(leaf) for part in ("embedding", "head") for leaf in jax.tree.leaves(abstract.get(part, {})))
    linears = [(name, *spec.architecture.linear_shape(name)) for name in spec_linears()]
    on_host = jax.default_backend() == "cpu"
    memory = {"process": resident_bytes(), "compiled programs": PROGRAMS[config.method] * 2**20} if on_host else {}
    memory["a layer, restored and stored"] = layer + 4 * sum(i * o for _, i, o in linears) + layer // 2
    if shape is None:
        memory["largest step"] = max(round(WRITING * ends), 4 * 4 * max(i * o for _, i, o in linears))
        return Plan(memory, _reading(spec))
    rows, length = shape
    size = jnp.dtype(compute_dtype).itemsize
    batch = min(config.statistics.batch_size, rows) * length
    memory["calibration rows"] = (
        math.ceil(rows / config.statistics.batch_size)
        * config.statistics.batch_size
        * (length * spec.architecture.hidden_size * size)
    )
    inputs = {reader: spec.architecture.linear_shape(reader)[0] for reader in READERS}
    held = inputs.values() if config.method == "awq" else [max(inputs.values())]
    memory["statistics"] = sum(4 * i * i for i in held)
    memory["largest step"] = max(
        _forward_bytes(spec, batch, length, size),
        round(WRITING * ends),
        max(_matrix_bytes(i, o, config) for _, i, o in linears),
    )
    return Plan(memory, _reading(spec) + _arithmetic(spec, config, rows * length) / (UTILISATION * peak_flops()))


def spec_linears() -> tuple[str, ...]:
    """The linears of a block, once each."""
    return tuple(name for names in READERS.values() for name in names)


def _forward_bytes(spec: ModelSpecification, tokens: int, length: int, size: int) -> int:
    """Activations of a block and the copy of the widest that statistics are made of."""
    architecture = spec.architecture
    widest = max(architecture.hidden_size, architecture.intermediate_size)
    scores = 3 * 4 * tokens * length * architecture.num_heads
    return (
        scores
        + tokens * (6 * architecture.hidden_size * size + 3 * architecture.intermediate_size * size)
        + (2 * 4 * tokens * widest + 4 * widest**2)
    )


def _matrix_bytes(inputs: int, outputs: int, config: QuantizeConfig) -> int:
    """Working set of the quantizer itself: copies of the Hessian and of the weight, in float32."""
    hessians = 4 if config.method.endswith("gptq") else 2
    return 4 * (hessians * inputs**2 + 6 * inputs * outputs)


def _reading(spec: ModelSpecification) -> float:
    """Seconds to read, convert and write the model, at a modest disk's rate."""
    total = sum(map(array_bytes, jax.tree.leaves(abstract_parameters(spec))))
    return total / 200e6 + 0.2 * spec.architecture.num_layers


def _arithmetic(spec: ModelSpecification, config: QuantizeConfig, tokens: int) -> float:
    """FLOPs of the passes over the calibration rows and of the quantizers."""
    architecture = spec.architecture
    linears = [architecture.linear_shape(name) for name in spec_linears()]
    inputs = [architecture.linear_shape(reader)[0] for reader in READERS]
    passes = (len(READERS) + 1) * tokens * layer_flops(spec, 0.0)
    statistics = sum(2.0 * tokens * i * i for i in inputs)
    per_matrix = {
        "magr": lambda i, o: 2.0 * config.magr.iterations * i * i * o,
        "gptq": lambda i, o: 4.0 * i * i * o + 2.0 * i**3,
        "awq": lambda i, o: 2.0 * 3 * config.awq.grid * i * i * o,
    }
    work = sum(cost(i, o) for name, cost in per_matrix.items() if name in config.method for i, o in linears)
    compared = sum(6.0 * i * i * o for i, o in linears)  # output errors, three times
    return architecture.num_layers * (passes + statistics + work + compared)
