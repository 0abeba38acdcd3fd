"""Decode speed by storage format: one token at a time, a random Llama of about 100 million parameters.

    python benchmarks/decode_quantized.py --output benchmarks/results/decode_quantized_cpu.json

Every format decodes the same number of tokens after the same prompt, inside one compiled loop, with the masked engine.
Weights are rounded to nearest in groups of 128. The time of a token is the difference of a long and a short decode, so
that prefill and dispatch drop out.
"""

import jax
import jax.numpy as jnp
from harness import Row, in_turns, parser, report

from qtale_jax.artifact import weight_bytes
from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.inference.generation import generate
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification
from qtale_jax.quantization.pipeline import quantize_parameters

ARCHITECTURE = Architecture(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    max_length=512,
    tied_head=True,
)
SHORT, LONG = 8, 40

FORMATS = {
    "int8": QuantizeConfig(bits=8, group_size=128, symmetric=True, embedding_bits=8),
    "int8, float head": QuantizeConfig(bits=8, group_size=128, symmetric=True),
    "int4": QuantizeConfig(bits=4, group_size=128, embedding_bits=8),
    "int4, float head": QuantizeConfig(bits=4, group_size=128),
    "int3": QuantizeConfig(bits=3, group_size=128, embedding_bits=8),
    "int2": QuantizeConfig(bits=2, group_size=128, embedding_bits=8),
}


def models(key: jax.Array):
    """Yields (name, specification, parameters, type of activations)."""
    spec = ModelSpecification(architecture=ARCHITECTURE)
    params = initialize(spec, key)
    yield "fp32", spec, params, jnp.float32
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, params)
    yield "bf16", spec.model_copy(update={"dtype": "bfloat16"}), half, jnp.bfloat16
    # Accelerators compute in bfloat16; CPUs have fast float32 products only.
    wide = jax.default_backend() == "cpu"
    for name, config in FORMATS.items():
        yield name, *quantize_parameters(spec, params, config)[:2], jnp.float32 if wide else jnp.bfloat16


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    prompt = jnp.ones((1, 4), jnp.int32)
    candidates, sizes = {}, {}
    for name, spec, params, dtype in models(jax.random.key(0)):
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
    rows += [Row(f"{name} weights", sizes[name] / 1e6, "MB", "fp32", sizes["fp32"] / sizes[name]) for name in sizes]
    report("decode_quantized", rows, arguments.output)


if __name__ == "__main__":
    main()
