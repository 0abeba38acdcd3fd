"""Which Hugging Face tensor is which parameter."""

from dataclasses import dataclass

from qtale_jax.models.specification import LINEARS, Architecture

MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

NORMS_WITH_POST = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
"""Where what attention and MLP give is normalised, too, one name means another norm."""

HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        name: its name there.
        shape: its shape there; linears are stored (outputs, inputs).
        parameter: path of our parameter.
        transposed: ours is the transpose. Rotary embeddings need no permutation: both sides rotate halves.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    transposed: bool = False

    @property
    def module(self) -> str:
        """Name of the module there that it belongs to."""
        return self.name.removesuffix(".weight")

    @property
    def node(self) -> str:
        """Path of the module here."""
        return self.parameter.rsplit("/", 1)[0]

    @property
    def key(self) -> str:
        """What `QuantizationSpecification.formats` calls it: "0/query", "embedding", "head"."""
        keys = self.node.split("/")
        return keys[0] if len(keys) == 1 else f"{keys[1]}/{keys[-1]}"

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear of a block."""
        return self.parameter.endswith("/kernel") and self.key.rsplit("/", 1)[-1] in LINEARS


def linear_path(layer: int, name: str) -> str:
    """Path of linear `name` (one of `LINEARS`) among the parameters."""
    return f"layers/{layer}/{'attention' if MODULES[name].startswith('self_attn') else 'mlp'}/{name}"


def tensors(architecture: Architecture) -> list[Tensor]:
    """All tensors of a checkpoint, in the order in which they are written; tied models have no `lm_head.weight`."""
    table = (architecture.vocab_size, architecture.hidden_size)
    width = (architecture.hidden_size,)
    found = [Tensor("model.embed_tokens.weight", table, "embedding/table")]
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}"
        for ours, theirs in (NORMS_WITH_POST if architecture.post_norms else NORMS).items():
            found.append(Tensor(f"{prefix}.{theirs}.weight", width, f"layers/{layer}/{ours}/scale"))
        if architecture.query_key_norm:
            for ours, theirs in HEAD_NORMS.items():
                path = f"layers/{layer}/attention/{ours}/scale"
                found.append(Tensor(f"{prefix}.{theirs}.weight", (architecture.head_dim,), path))
        for name in LINEARS:
            shape = architecture.linear_shape(name)[::-1]
            path, module = linear_path(layer, name), f"{prefix}.{MODULES[name]}"
            found.append(Tensor(f"{module}.weight", shape, f"{path}/kernel", transposed=True))
            if name in architecture.biases:
                found.append(Tensor(f"{module}.bias", shape[:1], f"{path}/bias"))
    found.append(Tensor("model.norm.weight", width, "final_norm/scale"))
    if not architecture.tied_head:
        found.append(Tensor("lm_head.weight", table, "head/kernel", transposed=True))
    return found
