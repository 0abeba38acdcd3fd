"""The sections of token-adaptive execution and of adapters."""

from typing import Literal

from pydantic import Field, model_validator

from qtale_jax.config.section import Fraction, Many, NotNegative, Positive, Section


class RoutingConfig(Section):
    """Token-adaptive layer execution: routers and the losses that shape them."""

    method: Literal["dense", "dllm", "qtale", "mod", "random"] = Field(
        default="qtale",
        description="dense: no routers; dllm: entropy_weight 0; mod: Mixture-of-Depths; random: no learning",
    )
    preset: Literal["qtale_plus"] | None = Field(
        default=None,
        description="qtale_plus: the recipe that keeps most accuracy, over all sections; keys that are given win",
    )
    always_on_layers: int = Field(default=2, ge=0, description="first layers without a router")
    always_on_tokens: int = Field(default=2, ge=0, description="first tokens of a sequence that execute every layer")
    router_hidden: Positive = Field(default=512, description="hidden width of a router")
    target: Fraction = Field(default=0.5, description="executed share that the rate loss aims at")
    target_range: tuple[Fraction, Fraction] | None = Field(
        default=None,
        strict=False,
        description="lowest and highest share: every step aims at another one, theta moving along; none: target",
    )
    counting: Literal["all", "routed"] = Field(
        default="all", description="layers that the target counts; D-LLM counts all"
    )
    rate_loss: Literal["token", "batch", "squared"] = Field(
        default="token",
        description="token: mean |w - R| per token (D-LLM); batch: |mean w - R| of a microbatch; squared: its square",
    )
    rate_weight: NotNegative = Field(default=5.0, description="lambda_1, weight of the rate loss")
    rate_schedule: Literal["sin", "constant"] = Field(default="sin", description="sin: rises as sin(pi/2 * progress)")
    entropy_weight: NotNegative = Field(default=0.3, description="lambda_2, weight of the entropy loss; 0 for dllm")
    entropy_schedule: Literal["constant", "anneal"] = Field(
        default="constant", description="anneal: lambda_2 falls to 0 between 20 and 80 percent of the steps"
    )
    noise_schedule: Literal["constant", "anneal"] = Field(
        default="constant", description="anneal: the noise falls to 0 between 20 and 80 percent of the steps"
    )
    entropy_form: Literal["log_cosh", "entropy"] = Field(
        default="log_cosh", description="log cosh(gap/2), or 1 - H(p)/ln 2"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Gumbel-softmax temperature of the straight-through gradient"
    )
    eviction: bool = Field(default=True, description="keys and values of skipped tokens are invisible to later tokens")
    eviction_gradient: bool = Field(default=True, description="the gate also receives the gradient through eviction")
    threshold: float = Field(
        default=0.5, ge=0.0, le=1.0, description="theta before calibration: execute iff p >= theta"
    )

    @model_validator(mode="after")
    def _check(self):
        if self.method == "dllm" and "entropy_weight" in self.model_fields_set and self.entropy_weight != 0:
            raise ValueError(
                f"method 'dllm' has no entropy term, found entropy_weight={self.entropy_weight}; use 'qtale'"
            )
        if self.method == "qtale" and self.entropy_weight == 0:
            raise ValueError("method 'qtale' needs entropy_weight > 0; without it the method is 'dllm'")
        if self.target_range is not None:
            low, high = self.target_range
            if low > high:
                raise ValueError(f"target_range has to rise, found [{low:g}, {high:g}]")
            if self.method in ("mod", "random"):
                raise ValueError(f"target_range does not go with method={self.method!r}; allowed: dllm or qtale")
        return self

    @property
    def effective_entropy_weight(self) -> float:
        """lambda_2 as applied: D-LLM has no entropy term."""
        return self.entropy_weight if self.method == "qtale" else 0.0


LinearName = Literal["query", "key", "value", "output", "gate", "up", "down"]


class LoraConfig(Section):
    """Low-rank adapters next to frozen linears."""

    rank: Positive = Field(default=8, description="rank r; A ~ N(0, 1/r^2), B = 0, no alpha/r scale (D-LLM)")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="dropout on the adapter's output")
    targets: Many[LinearName] = Field(default=("query", "key", "value"), description="linears that get an adapter")
