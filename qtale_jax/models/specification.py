"""What a model is, without its weights: everything static that `model.json` records.

`ModelSpecification` is enough to build the skeleton of a model (`models.decoder.abstract_parameters`), quantized or
not, and to run it. All classes are frozen and hashable, so that they can be static arguments of compiled functions.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
"""The seven linears of a block, in the order in which a forward pass uses them."""


class _Frozen(BaseModel, frozen=True, extra="forbid"):
    """Base of all classes here: immutable, hashable, unknown fields refused."""


class RopeScaling(_Frozen, frozen=True):
    """Llama-3 frequency scaling: low frequencies are divided by `factor`, high ones kept, a ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


class LinearScaling(_Frozen, frozen=True):
    """Position interpolation (Chen et al., 2023): every frequency is divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(gt=0)


def _kind(scaling: Any) -> str | None:
    """What tells scalings apart; those stored before there was a second kind do not say it."""
    return scaling.get("kind", "llama3") if isinstance(scaling, dict) else getattr(scaling, "kind", None)


AnyScaling = Annotated[
    Annotated[RopeScaling, Tag("llama3")] | Annotated[LinearScaling, Tag("linear")], Discriminator(_kind)
]
"""How rotary frequencies differ from the powers of their base."""


LinearName = Literal["query", "key", "value", "output", "gate", "up", "down"]


class Architecture(_Frozen, frozen=True):
    """Shape of a decoder, and what its family adds to a Llama.

    Attributes:
        family: the `model_type` that Hugging Face knows it by; what is computed depends on the other fields alone.
        biases: linears of a block that add a bias.
        query_key_norm: RMS norm over each head of query and key, before they are rotated.
        sliding_window: a query sees the keys of this many positions, its own and those before it; None: all.
        global_layers: the layers that have no window although the others have, ascending; all others are local.
        rope_scaling: of the rotary frequencies of all layers, or of those without a `local_rope_theta`.
        local_rope_theta: base of the rotary frequencies of local layers, which are not scaled; None: as everywhere.
        norm_offset: added to the scale of every norm but those of routers; 1 where zeros stand for "as it is".
        post_norms: RMS norm of what attention and MLP give, before it is added to the residual stream.
        scaled_embedding: token embeddings are multiplied by the root of `hidden_size`; a tied head is not.
        activation: of the gate of the MLP; "gelu_tanh" is the tanh approximation of GELU.
        query_pre_attn_scalar: attention scores are divided by its root; None: `head_dim`.
        attention_softcap: scores s become c tanh(s / c) before they are masked; None: they do not.
        logit_softcap: the same for the logits.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"] = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: AnyScaling | None = None
    tied_head: bool = False
    biases: tuple[LinearName, ...] = ()
    query_key_norm: bool = False
    sliding_window: int | None = Field(default=None, ge=1)
    global_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = Field(default=None, gt=0)
    norm_offset: float = 0.0
    post_norms: bool = False
    scaled_embedding: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    query_pre_attn_scalar: float | None = Field(default=None, gt=0)
    attention_softcap: float | None = Field(default=None, gt=0)
    logit_softcap: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self):
        if self.global_layers:
            if self.sliding_window is None:
                raise ValueError("global_layers tells layers apart by their window, and sliding_window is None")
            inside = set(self.global_layers) < set(range(self.num_layers))
            if not inside or list(self.global_layers) != sorted(set(self.global_layers)):
                last = self.num_layers - 1
                raise ValueError(f"global_layers={self.global_layers}; allowed: ascending, some of 0 to {last}")
        return self

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def is_local(self, layer: int) -> bool:
        """Whether a layer has the sliding window, and with it the rotary frequencies of local layers."""
        return self.sliding_window is not None and layer not in self.global_layers

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None: it sees all keys."""
        return self.sliding_window if self.is_local(layer) else None

    def with_layers(self, layers: Sequence[int]) -> "Architecture":
        """The architecture that has these layers of this one, in their order, and no others."""
        kept = tuple(new for new, old in enumerate(layers) if old in self.global_layers)
        window = self.sliding_window
        if self.global_layers and len(kept) == len(layers):
            kept, window = (), None
        fields = {"num_layers": len(layers), "global_layers": kept, "sliding_window": window}
        return self.model_copy(update=fields)

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Returns (inputs, outputs) of one of `LINEARS`."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "query": (hidden, heads),
            "key": (hidden, kv),
            "value": (hidden, kv),
            "output": (heads, hidden),
            "gate": (hidden, mlp),
            "up": (hidden, mlp),
            "down": (mlp, hidden),
        }[name]


class RoutingSpecification(_Frozen, frozen=True):
    """Which layers and tokens are routed, and the thresholds that decide at inference.

    `thresholds` maps a bit width ("16", "4", ...) to one theta per routed layer; widths without an entry use 0.5.
    `calibration` records, per bit width, how theta was found and on what. A "hashed" router has no parameters: its
    probabilities are pseudo-random (`models.router.hashed_logits`).
    """

    method: Literal["dllm", "qtale", "mod", "random"]
    router: Literal["learned", "hashed"] = "learned"
    always_on_layers: int = Field(default=2, ge=0)
    always_on_tokens: int = Field(default=2, ge=0)
    router_hidden: int = 512
    counting: Literal["all", "routed"] = "all"
    target: float = 0.5
    eviction: bool = True
    thresholds: dict[str, tuple[float, ...]] = {}
    calibration: dict[str, dict[str, Any]] = {}

    def __hash__(self) -> int:  # dicts do not hash; equality stays field by field
        return hash((self.method, self.always_on_layers, self.always_on_tokens, self.router_hidden))


class LoraSpecification(_Frozen, frozen=True):
    """Adapters next to some of the linears: y = x W + (x A) B, no alpha/r scale."""

    rank: int
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value")


QUANTIZERS = ("rtn", "awq", "gptq", "magr", "magr+gptq")
"""Post-training quantizers; "magr" rounds to nearest after MagR's preprocessing."""

Quantizer = Literal["rtn", "awq", "gptq", "magr", "magr+gptq"]
ScaleType = Literal["float32", "bfloat16", "float16"]
Kernels = Literal["auto", "xla", "pallas", "interpreted"]


class TensorFormat(_Frozen, frozen=True):
    """How a matrix is stored, and computed with: integers with one scale per group of inputs and output channel.

    Attributes:
        bits: width of the integers.
        group_size: inputs per scale; -1 is one group over all inputs. One that does not divide is refused earlier.
        symmetric: no zero points.
        scale_dtype: type of the scales; weights are rounded to the grid of the stored scales.
        activation_bits: 8: activations are rounded per token and the product is an integer dot; 16: they are not.
        permuted: the inputs stand in another order, given by an array beside them (GPTQ checkpoints whose groups
            follow the activation order).
    """

    bits: Literal[2, 3, 4, 8]
    group_size: int = -1
    symmetric: bool = False
    scale_dtype: ScaleType = "float32"
    activation_bits: Literal[8, 16] = 16
    permuted: bool = False

    def groups(self, inputs: int) -> int:
        """Number of groups along `inputs`."""
        return 1 if self.group_size == -1 else inputs // self.group_size


class QuantizationSpecification(_Frozen, frozen=True):
    """What post-training quantization did.

    `formats` has an entry per quantized matrix: `"{layer}/{name}"` for the linears of a block, `"{layer}/router"` for
    the wide matrix of a router, `"embedding"` (whose rows are its output channels) and `"head"`. What has none is in
    floating point. `calibration` records the data that the quantizer saw.
    """

    method: Quantizer
    formats: dict[str, TensorFormat]
    calibration: dict[str, Any] = {}

    def format(self, layer: int, name: str) -> TensorFormat | None:
        """Storage format of linear `name` (or "router") of `layer`; None: floating point."""
        return self.formats.get(f"{layer}/{name}")

    @property
    def linears(self) -> dict[str, TensorFormat]:
        """The formats of the linears of blocks."""
        return {name: format for name, format in self.formats.items() if name.split("/")[-1] in LINEARS}

    @property
    def main_format(self) -> TensorFormat:
        """The format that most linears have."""
        return Counter(self.linears.values()).most_common(1)[0][0]

    @property
    def bits(self) -> int:
        """The bit width that most linears have: the key of `RoutingSpecification.thresholds`."""
        return Counter(format.bits for format in self.linears.values()).most_common(1)[0][0]

    def __hash__(self) -> int:
        return hash((self.method, tuple(sorted(self.formats.items(), key=lambda item: item[0]))))


class ModelSpecification(_Frozen, frozen=True):
    """The static half of a model directory.

    Attributes:
        dropped_layers: layers of the model that it was made of that were taken out (static layer dropping).
        kernels: what computes products with stored weights and attention to pages where there is a choice: "xla";
            "pallas" (`qtale_jax.kernels`) where they fit, on TPUs and GPUs; "auto": pallas where it was measured
            faster, on a GPU; "interpreted" runs those for TPUs slowly on any device. Not part of a model directory.
    """

    architecture: Architecture
    routing: RoutingSpecification | None = None
    lora: LoraSpecification | None = None
    quantization: QuantizationSpecification | None = None
    dropped_layers: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: Kernels = Field(default="auto", exclude=True)

    @model_validator(mode="after")
    def _check(self):
        if self.routing and self.routing.always_on_layers >= self.architecture.num_layers:
            raise ValueError(
                f"always_on_layers={self.routing.always_on_layers} leaves no routed layer of "
                f"{self.architecture.num_layers}"
            )
        return self

    @property
    def bits(self) -> int:
        """Bits of the linears: 16 without quantization."""
        return self.quantization.bits if self.quantization else 16

    @property
    def kept_share(self) -> float:
        """Share of layers that are left after static dropping: what one token executes at most, of the whole model."""
        layers = self.architecture.num_layers
        return layers / (layers + len(self.dropped_layers))

    @property
    def structure(self) -> "ModelSpecification":
        """The specification without thresholds and notes, which no program depends on: keys compiled functions."""
        if self.routing is None:
            return self
        unused = {"thresholds": {}, "calibration": {}, "method": "qtale", "target": 0.5, "counting": "all"}
        bare = self.routing.model_copy(update=unused)
        return self.model_copy(update={"routing": bare})

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Indices of the layers that not every token has to execute."""
        if self.routing is None:
            return ()
        return tuple(range(self.routing.always_on_layers, self.architecture.num_layers))

    @property
    def layers_with_router(self) -> tuple[int, ...]:
        """Indices of the layers whose router has parameters."""
        return self.routed_layers if self.routing and self.routing.router == "learned" else ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Theta per routed layer at this model's bit width."""
        if self.routing is None:
            return ()
        return self.routing.thresholds.get(str(self.bits), (0.5,) * len(self.routed_layers))
