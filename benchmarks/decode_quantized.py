"""Decode speed by storage format: one token at a time, a random Llama of about 100 million parameters.

    python benchmarks/decode_quantized.py --output benchmarks/results/decode_quantized_cpu.json
    python benchmarks/decode_quantized.py --model 7b --layers 4 --formats int8 int4 int3 --output FILE   on a GPU or TPU

Every format decodes the same number of tokens after the same prompt, inside one compiled loop, with the masked engine.
Weights are rounded to nearest in groups of 128. The time of a token is the difference of a long and a short decode, so
that prefill and dispatch drop out. On accelerators the Pallas kernels stand beside XLA.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from harness import Row, in_turns, parser, report
from random_llama import ARCHITECTURES

from qtale_jax.artifact import weight_bytes
from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.inference.generation import generate
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification
from qtale_jax.quantization.pipeline import quantize_parameters

SHORT, LONG = 8, 40

FORMATS = {
    "int8": QuantizeConfig(bits=8, group_size=128, symmetric=True, embedding_bits=8),
    "int8, float head": QuantizeConfig(bits=8, group_size=128, symmetric=True),
    "int4": QuantizeConfig(bits=4, group_size=128, embedding_bits=8),
    "int4, float head": QuantizeConfig(bits=4, group_size=128),
    "int3": QuantizeConfig(bits=3, group_size=128, embedding_bits=8),
    "int2": QuantizeConfig(bits=2, group_size=128, embedding_bits=8),
}


def models(architecture: Architecture, formats: Iterable[str], key: jax.Array):
    """Yields (name, specification, parameters, type of activations)."""
    spec = ModelSpecification(architecture=architecture)
    params = initialize(spec, key)
    # Accelerators compute in bfloat16; CPUs have fast float32 products only.
    wide = jax.default_backend() == "cpu"
    if wide:
        yield "fp32", spec, params, jnp.float32
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, params)
    yield "bf16", spec.model_copy(update={"dtype": "bfloat16"}), half, jnp.bfloat16
    for name in formats:
        made, stored, _ = quantize_parameters(spec, params, FORMATS[name])
        plain = made.model_copy(update={"kernels": "xla"})
        yield name, plain, stored, jnp.float32 if wide else jnp.bfloat16
        if not wide:
            yield f"{name}, pallas", made.model_copy(update={"kernels": "pallas"}), stored, jnp.bfloat16


def main() -> None:
    """Measures, prints and writes."""
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--model", choices=ARCHITECTURES, default="134m", help="its layers (default 134m)")
    found.add_argument("--layers", type=int, help="how many of them (default: all)")
    found.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="formats (default: all)")
    arguments = found.parse_args()
    update = {"tied_head": True, "max_length": 512}
    if arguments.layers:
        update["num_layers"] = arguments.layers
    architecture = ARCHITECTURES[arguments.model].model_copy(update=update)
    prompt = jnp.ones((1, 4), jnp.int32)
    candidates, sizes = {}, {}
    for name, spec, params, dtype in models(architecture, arguments.formats, jax.random.key(0)):
        sizes[name] = weight_bytes(params)["total"]
        for tokens in (SHORT, LONG):

            def run(spec=spec, params=params, dtype=dtype, tokens=tokens):
                return generate(
                    spec,
                    params,
                    prompt,
                    jnp.asarray([4], jnp.int32),
                    inference_policy(spec),
                    jax.random.key(1),
                    jnp.float32(0),
                    jnp.float32(1),
                    jnp.int32(-1),
                    max_new_tokens=tokens,
                    compute_dtype=dtype,
                ).tokens

            candidates[f"{name}/{tokens}"] = run
    times = in_turns(candidates, arguments.rounds)
    speed = {name: (LONG - SHORT) / (times[f"{name}/{LONG}"] - times[f"{name}/{SHORT}"]) for name in sizes}
    base = "fp32" if jax.default_backend() == "cpu" else "bf16"
    rows = [Row(f"{name} decode", speed[name], "tokens/s", base, speed[name] / speed[base]) for name in sizes]
    rows += [Row(f"{name} weights", sizes[name] / 1e6, "MB", base, sizes[base] / sizes[name]) for name in sizes]
    report(f"decode_quantized, {architecture.num_layers} layers of {arguments.model}", rows, arguments.output)


if __name__ == "__main__":
    main()
