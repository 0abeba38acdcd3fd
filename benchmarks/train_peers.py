"""Speed of a routed LoRA training step beside D-LLM's reference code on torch: 8 layers, d 512, 4 rows of 256 tokens.

    pip install torch==2.13.0
    python benchmarks/train_peers.py CHECKOUT --output benchmarks/results/train_peers_cpu.json

CHECKOUT is a clone of https://github.com/Jyk-122/D-LLM, whose `llama/model_train.py` is run, with AdamW over its LoRA
and routers as in its `finetuning.py`. It turns activations into bfloat16 for the GPUs that it is written for; here they
stay in float32, as ours do. Both sides have the same shapes, routers, adapters and dropout, and take whole steps.
Masked training takes the same time whatever executes; training that skips is measured where half of the layers execute.

Every side runs in a process of its own: ours with freed memory kept, as `python -m qtale_jax.train` does on CPUs, the
reference as it comes, and with freed memory kept.
"""

import functools
import types
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from harness import Row, each_round, elsewhere, parser, report
from train import SMALLER, Step, configuration
from train_skip import SHARES, step

ROWS, LENGTH, VOCABULARY = 4, 256, 32000
PEER = "D-LLM reference, torch float32"


def reference(checkout: Path) -> types.ModuleType:
    """The reference's model of training, without its casts to bfloat16."""
    module = types.ModuleType("reference")
    source = (checkout / "llama" / "model_train.py").read_text(encoding="utf-8")
    exec(compile(source.replace(".bfloat16()", ".float()"), "model_train.py", "exec"), module.__dict__)
    return module


def reference_step(checkout: Path) -> Callable[[], float]:
    """A training step of the reference that is called again and again on one batch."""
    code, config = reference(checkout), configuration(SMALLER, ROWS, LENGTH)
    routing = config.routing
    torch.manual_seed(0)
    model = code.Transformer(
        code.ModelArgs(
            dim=SMALLER["hidden_size"],
            n_layers=SMALLER["num_layers"],
            n_heads=SMALLER["num_heads"],
            vocab_size=VOCABULARY,
            multiple_of=32,  # an MLP of 1376
            max_seq_len=LENGTH,
            lora_rank=config.lora.rank,
            dynamic_active_target=routing.target,
            dynamic_start_layer=routing.always_on_layers,
            dynamic_router_hdim=routing.router_hidden,
            dynamic_reserve_initials=routing.always_on_tokens,
        )
    )
    assert model.layers[0].feed_forward.w1.out_features == SMALLER["intermediate_size"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name or "router" in name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02)
    model.train()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, VOCABULARY, (ROWS, LENGTH)))
    present = torch.ones((ROWS, LENGTH))

    def step() -> float:
        cross_entropy, active, _ = model(tokens, tokens, present, present)
        loss = cross_entropy + routing.rate_weight * active
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ours(share: float | None) -> Step:
    """Our step: masked, or one that skips."""
    return Step(configuration(SMALLER, ROWS, LENGTH)) if share is None else step(SMALLER, share)


def measure(checkout: Path, rounds: int) -> list[Row]:
    """Tokens per second of both."""
    theirs = functools.partial(reference_step, checkout)
    sides = {PEER: (theirs, False), f"{PEER}, freed memory kept": (theirs, True)}
    sides["ours, masked"] = (functools.partial(ours, None), True)
    sides |= {f"ours, skipped share {share:g}": (functools.partial(ours, share), True) for share in SHARES}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(elsewhere(*side)) for name, side in sides.items()}
        # Ratios within a round, then their median: a slow spell of the machine hits both sides of a ratio.
        times = each_round(processes, rounds)
    speed = {name: ROWS * LENGTH / float(np.median(seconds)) for name, seconds in times.items()}
    ratio = {name: float(np.median(times[PEER] / seconds)) for name, seconds in times.items()}
    return [Row(f"{name}, 8 layers, d 512", speed[name], "tokens/s", PEER, ratio[name]) for name in sides]


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("checkout", type=Path, help="clone of the reference's repository")
    found = arguments.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    report("train_peers", measure(found.checkout, found.rounds), found.output)


if __name__ == "__main__":
    main()
