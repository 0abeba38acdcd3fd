"""Makes `reference.npz`: losses and gradients of a tiny routed model, by the reference code of D-LLM on torch.

    pip install torch==2.13.0 numpy
    python tests/training/golden/generate.py CHECKOUT

CHECKOUT is a clone of https://github.com/Jyk-122/D-LLM. Its `llama/model_train.py`, which casts to bfloat16, runs in
float32 with three things replaced: Gumbel noise is zero, dropout is off, and a token sees its own key even if that is
evicted, as in this project (in the reference a skipped token can be left without any key). Queries are keys of equal
length, so that a token likes its own key best: for an evicted key that is liked better than all visible ones, this
project bounds the gradient of its gate, and the reference does not.

The file holds the weights under the reference's names, the batch, both losses, and the gradient of every adapter and
router under "gradient of NAME".
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

RATE_WEIGHT = 5.0
SHAPE = {
    "dim": 16,
    "n_layers": 3,
    "n_heads": 1,
    "vocab_size": 24,
    "multiple_of": 8,  # an MLP of 48
    "max_seq_len": 16,
    "lora_rank": 2,
    "dynamic_active_target": 0.5,
    "dynamic_start_layer": 1,
    "dynamic_router_hdim": 8,
    "dynamic_reserve_initials": 1,
}


def hard_softmax(logits: torch.Tensor, tau: float, hard: bool, dim: int) -> torch.Tensor:
    """`gumbel_softmax` without its noise."""
    assert tau == 1 and hard and dim == -1
    soft = logits.softmax(dim)
    return F.one_hot(soft.argmax(dim), 2).to(soft.dtype) - soft.detach() + soft


def reference(checkout: Path) -> types.ModuleType:
    """The reference's model, in float32, with its noise and its eviction of own keys replaced."""
    module = types.ModuleType("reference")
    source = (checkout / "llama" / "model_train.py").read_text(encoding="utf-8").replace(".bfloat16()", ".float()")
    exec(compile(source, "model_train.py", "exec"), module.__dict__)
    module.F = types.SimpleNamespace(**{**vars(F), "gumbel_softmax": hard_softmax})
    route = module.RouterModule.forward

    def keep_own(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decided, mask = route(self, x)
        return decided, torch.where(torch.eye(x.shape[1], dtype=torch.bool), torch.ones(()), mask)

    module.RouterModule.forward = keep_own
    return module


def main(checkout: Path) -> None:
    """Computes and writes."""
    code = reference(checkout)
    torch.manual_seed(0)
    model = code.Transformer(code.ModelArgs(**SHAPE)).train()
    for name, parameter in model.named_parameters():
        if "linear_B" in name:
            torch.nn.init.normal_(parameter, std=0.03)
        if name.endswith("router.linear_2.weight"):
            parameter.data *= 4  # routers that decide both ways
        if name.endswith("router.linear_2.bias"):
            parameter.data[:] = torch.tensor([0.0, 0.1])
        parameter.requires_grad = "lora" in name or "router" in name
    for layer in model.layers:
        attention = layer.attention
        torch.nn.init.orthogonal_(attention.wq.weight)
        attention.wk.load_state_dict(attention.wq.state_dict())
        attention.lora_k.load_state_dict(attention.lora_q.state_dict())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = torch.randint(1, SHAPE["vocab_size"], (2, 12))
    labels = tokens.clone()
    labels[:, :4] = 0  # the prompt
    present = torch.ones(2, 12)
    tokens[1, 9:], labels[1, 9:], present[1, 9:] = 0, 0, 0
    cross_entropy, active, metric = model(tokens, labels, present, present)
    (cross_entropy + RATE_WEIGHT * active).backward()
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    arrays |= {f"gradient of {n}": p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    arrays |= {"tokens": tokens.numpy(), "labels": labels.numpy(), "present": present.numpy()}
    arrays |= {"cross_entropy": cross_entropy.detach().numpy(), "active": active.detach().numpy()}
    print("executed", metric["mean_scalar_ratio"].item())
    np.savez_compressed(Path(__file__).with_name("reference.npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
