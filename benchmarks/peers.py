"""Decode speed beside transformers on torch with the same weights: a random Llama of about 134 million parameters.

    pip install torch==2.13.0
    python benchmarks/peers.py --output benchmarks/results/peers_cpu.json

Greedy, float32, batch 1 and 8, after short and long prompts. The time of a token is the difference of a long and a
short decode. Both sides have to give the same tokens before they are timed.
"""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from harness import Row, in_turns, parser, report
from random_llama import HASHED, generation, model, prompts

from qtale_jax.artifact import save_model
from qtale_jax.models.huggingface import to_huggingface
from qtale_jax.models.specification import ModelSpecification

SHORT, LONG = 8, 40
PEER = "transformers"


def exported(spec: ModelSpecification, params: dict) -> transformers.LlamaForCausalLM:
    """The model as transformers opens what `convert --to-hf` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", spec, params)
        to_huggingface(Path(folder) / "model", Path(folder) / "exported")
        found = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "exported", dtype=torch.float32)
    return found.eval()


def peer_generation(peer: transformers.LlamaForCausalLM, rows: int, length: int, new: int) -> Callable[[], np.ndarray]:
    """A run that adds `new` tokens to each of the prompts, greedily, with its default cache."""
    tokens = torch.from_numpy(prompts(rows, length)[0].astype(np.int64))

    @torch.inference_mode()
    def run() -> np.ndarray:
        out = peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )
        return out[:, length:].numpy()

    return run


def measure(layers: int, rows: int, length: int, rounds: int) -> list[Row]:
    """Tokens per second of all rows together: transformers, our dense decode, our decode of half and of a quarter."""
    spec, params = model(layers, None)
    hashed = model(layers, HASHED)
    peer = exported(spec, params)
    cases = {"dense": (spec, params, 1.0)} | {f"ratio {ratio:g}": (*hashed, ratio) for ratio in (0.5, 0.25)}
    runs: dict[tuple[str, int], Callable] = {}
    for new in (SHORT, LONG):
        runs[PEER, new] = peer_generation(peer, rows, length, new)
        for name, case in cases.items():
            runs[name, new] = generation(*case, rows, length, new)
    np.testing.assert_array_equal(np.asarray(runs["dense", LONG]().tokens), runs[PEER, LONG]())
    times = in_turns({f"{name}/{new}": _awaited(run) for (name, new), run in runs.items()}, rounds)
    speed = {
        name: rows * (LONG - SHORT) / (times[f"{name}/{LONG}"] - times[f"{name}/{SHORT}"]) for name in (PEER, *cases)
    }
    return [
        Row(f"{name}, batch {rows}, prompts of {length}", speed[name], "tokens/s", PEER, speed[name] / speed[PEER])
        for name in speed
    ]


def _awaited(run: Callable) -> Callable:
    """Arrays, which `in_turns` waits for."""

    def timed():
        out = run()
        return out if isinstance(out, np.ndarray) else out.tokens

    return timed


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--layers", type=int, default=12, help="layers of the model (default 12)")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows (default 1 8)")
    arguments.add_argument("--prompts", type=int, nargs="+", default=[16, 512], help="their lengths (default 16 512)")
    found = arguments.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; transformers {transformers.__version__}")
    cases = itertools.product(found.batches, found.prompts)
    rows = [row for batch, length in cases for row in measure(found.layers, batch, length, found.rounds)]
    report("peers", rows, found.output)


if __name__ == "__main__":
    main()
