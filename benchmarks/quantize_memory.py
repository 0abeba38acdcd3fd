"""Peak memory of quantization against its plan, on a random Llama of about 100 million parameters.

    python benchmarks/quantize_memory.py --output benchmarks/results/quantize_memory_cpu.json

Every method runs in a process of its own, on a model directory and calibration rows that are made for it: packed rows
of 256 tokens. The peak is what the operating system counted for the process, everything included.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from harness import Row, parser, report

METHODS = ("rtn", "awq", "gptq", "magr+gptq")

CHILD = """
import json, sys
import jax.numpy as jnp
from qtale_jax.config.loading import load_config
from qtale_jax.quantization.memory import peak_resident_bytes
from qtale_jax.quantization.plan import plan
from qtale_jax.quantization.streaming import QuantizationRun

config = load_config(sys.argv[1], sys.argv[2:])
job = QuantizationRun(config.quantize.model, config)
shape = None if job.rows is None else job.rows.tokens.shape
expected = plan(job.spec, job.formats, config.quantize, shape, jnp.dtype("float32"))
job.carry_out(config.quantize.output)
print(json.dumps({"planned": expected.peak, "parts": expected.memory, "peak": peak_resident_bytes()}))
"""


def make_model(path: Path) -> None:
    """Writes the random model."""
    from decode_quantized import ARCHITECTURE

    from qtale_jax.artifact import save_model
    from qtale_jax.data.tokens import load_tokenizer
    from qtale_jax.models.decoder import initialize
    from qtale_jax.models.specification import ModelSpecification, RoutingSpecification

    routing = RoutingSpecification(method="qtale", router_hidden=64)
    spec = ModelSpecification(architecture=ARCHITECTURE, routing=routing)
    save_model(path, spec, initialize(spec, jax.random.key(0)), tokenizer=load_tokenizer("reasoning"))


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model")
        config = root / "config.yaml"
        config.write_text(
            f"data: {{kind: reasoning, path: {root}/data, length: 256, packing: true, held_out: 0.5}}\n"
            # Iterations of MagR take time, not memory.
            f"quantize: {{model: {root}/model, bits: 4, group_size: 128, statistics: {{examples: 900}}, "
            "magr: {iterations: 10}}\n"
        )
        for method in METHODS:
            command = [sys.executable, "-c", CHILD, str(config), f"quantize.method={method}"]
            done = subprocess.run(
                [*command, f"quantize.output={root}/{method}"], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(method, {name: round(size / 1e6) for name, size in found["parts"].items()}, file=sys.stderr)
            ratio = found["peak"] / found["planned"]
            rows.append(
                Row(f"{method} peak", found["peak"] / 1e6, "MB", f"planned {found['planned'] / 1e6:.0f}", ratio)
            )
    report("quantize_memory", rows, arguments.output)


if __name__ == "__main__":
    main()
