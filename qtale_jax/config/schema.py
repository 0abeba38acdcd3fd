"""Every configuration key, with its type, default, limits and one line of help.

A section is a frozen pydantic model that refuses unknown keys. Checks that need one section live in that section;
checks across sections live in `combinations`. Stages receive the whole `Config` and read their own section.
"""

from typing import Literal

from pydantic import Field, model_validator

from qtale_jax.config.budget import BudgetConfig
from qtale_jax.config.combinations import check_combinations
from qtale_jax.config.distributed import DistributedConfig
from qtale_jax.config.planning import PlanConfig
from qtale_jax.config.section import Bits, Fraction, GroupSize, Many, NotNegative, Positive, Section, Seed
from qtale_jax.config.serving import ServeConfig


class RopeScalingConfig(Section):
    """Llama-3 frequency scaling of the rotary embedding."""

    factor: float = Field(default=8.0, gt=0, description="how much longer than the original context")
    low_freq_factor: float = Field(
        default=1.0, gt=0, description="wavelengths above original_length / this are divided by factor"
    )
    high_freq_factor: float = Field(default=4.0, gt=0, description="wavelengths below original_length / this are kept")
    original_length: Positive = Field(default=8192, description="context of the unscaled model, tokens")


class ArchitectureConfig(Section):
    """Shape of a Llama-family decoder, for models initialised at random."""

    vocab_size: Positive | None = Field(
        default=None, description="rows of the embedding; default: the tokenizer's size"
    )
    hidden_size: Positive = Field(default=64, description="width of the residual stream")
    intermediate_size: Positive = Field(default=128, description="width of the SwiGLU MLP")
    num_layers: Positive = Field(default=10, description="transformer blocks")
    num_heads: Positive = Field(default=4, description="query heads")
    num_kv_heads: Positive | None = Field(default=None, description="key and value heads; default: num_heads")
    head_dim: Positive | None = Field(default=None, description="width of a head; default: hidden_size / num_heads")
    max_length: Positive = Field(default=512, description="longest sequence, tokens")
    norm_eps: float = Field(default=1e-5, gt=0, description="added to the mean square in RMSNorm")
    rope_theta: float = Field(default=10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: RopeScalingConfig | None = Field(default=None, description="Llama-3 frequency scaling")
    tied_head: bool = Field(default=False, description="the output head is the embedding")

    @model_validator(mode="after")
    def _check(self):
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        return self


class DropConfig(Section):
    """Static layer dropping: layers that are taken out of the parent before fine-tuning (ShortGPT, Men, 2024)."""

    keep: Fraction = Field(default=1.0, description="share of layers that stays; the first always_on_layers always do")
    by: Literal["influence", "even"] = Field(
        default="influence", description="influence: those that change the hidden states least go; even: evenly spaced"
    )
    examples: Positive = Field(default=128, description="calibration examples that influence is measured on")


class ModelConfig(Section):
    """Where training starts: a model directory, or a random initialisation."""

    path: str | None = Field(
        default=None, description="model directory to start from; none: initialise architecture at random"
    )
    architecture: ArchitectureConfig = Field(default=ArchitectureConfig(), description="shape when path is not given")
    tokenizer: str = Field(
        default="reasoning",
        description="'reasoning', 'reasoning-study', or a directory with tokenizer.json; used without path",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="storage type of frozen weights")
    drop: DropConfig = Field(default=DropConfig(), description="layers that are taken out of the parent")


class RoutingConfig(Section):
    """Token-adaptive layer execution: routers and the losses that shape them."""

    method: Literal["dense", "dllm", "qtale", "mod", "random"] = Field(
        default="qtale",
        description="dense: no routers; dllm: entropy_weight 0; mod: Mixture-of-Depths; random: no learning",
    )
    preset: Literal["qtale_plus"] | None = Field(
        default=None, description="qtale_plus: a recipe under study, over all sections; keys that are given win"
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
        description="token: mean |w - R| per token (D-LLM); batch: |mean w - R|; squared: its square",
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


class DataConfig(Section):
    """What is read, how it becomes tokens, how tokens become batches."""

    kind: Literal["reasoning", "text", "instruction", "multiple_choice", "published"] = Field(
        default="reasoning", description="format of the source; published: tasks, as the datasets library has them"
    )
    path: str | None = Field(
        default=None,
        description="file or directory; reasoning: where the generated set is kept; published: folder of saved sets",
    )
    paths: Many[str] = Field(
        default=(), description="instruction, multiple_choice: several files instead of path, each with its own tail"
    )
    evaluation_path: str | None = Field(
        default=None, description="file for validation and test; default: the tail of path"
    )
    suite: Literal["basic", "study"] = Field(default="basic", description="reasoning: which suite of tasks")
    tasks: Many[str] = Field(
        default=(), description="subset of tasks; empty: all, but outside training none that the suite holds out"
    )
    separator: str = Field(default="<|endoftext|>", description="text: splits documents")
    held_out: float = Field(
        default=0.1, ge=0, lt=1, description="share at the end of path kept for validation and test"
    )
    length: int = Field(default=64, ge=4, description="tokens per row, after packing or padding")
    packing: bool = Field(default=False, description="several examples per row, kept apart by segment ids")
    loss_on: Literal["response", "all"] = Field(
        default="response", description="tokens that count in the cross-entropy"
    )
    truncation: Literal["error", "right", "drop"] = Field(default="drop", description="examples longer than length")
    max_examples: int | None = Field(default=None, gt=0, description="read at most this many training examples")

    @model_validator(mode="after")
    def _check(self):
        if self.path is None and not self.paths and self.kind not in ("reasoning", "published"):
            raise ValueError(f"kind={self.kind!r} needs path, the file or directory to read")
        if self.paths and self.kind not in ("instruction", "multiple_choice"):
            raise ValueError(f"paths does not go with kind={self.kind!r}; allowed: instruction or multiple_choice")
        if self.paths and self.path is not None:
            raise ValueError("path and paths are both given; allowed: one of them")
        return self


class DistillationConfig(Section):
    """Nearness to the dense forward pass of the starting model: in its predictions, in its last residual stream."""

    weight: NotNegative = Field(default=0.0, description="weight of the KL term; 0: off")
    hidden_weight: NotNegative = Field(
        default=0.0, description="weight of the squared distance of the normed last residual streams, of all tokens"
    )
    temperature: float = Field(default=1.0, gt=0, description="softening of both distributions")

    @property
    def active(self) -> bool:
        """Whether there is a teacher at all."""
        return self.weight > 0 or self.hidden_weight > 0


class WeightFormatConfig(Section):
    """Integers that weights are rounded to."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits per weight")
    group_size: GroupSize = Field(default=-1, description="inputs per scale; -1: one scale per output channel")
    symmetric: bool = Field(default=False, description="no zero point")


class QuantizationAwareConfig(Section):
    """Fake quantization of the merged weights during fine-tuning, with the identity as gradient."""

    formats: Many[WeightFormatConfig] = Field(
        default=(), description="deployed formats, one drawn per quantized step; empty: off"
    )
    form: Literal["round", "noise"] = Field(
        default="round", description="round to nearest, or add uniform noise as wide as the rounding error"
    )
    every: Positive = Field(default=2, description="quantize on every k-th step, full precision on the others")


class OptimizerConfig(Section):
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    router_learning_rate: float | None = Field(
        default=None, gt=0, description="peak for routers; default: learning_rate"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: NotNegative = Field(default=0.02, description="decoupled decay; none on one-dimensional parameters")
    clip: NotNegative = Field(default=1.0, description="global gradient norm; 0: off")
    warmup: Fraction = Field(default=0.1, description="share of the steps with linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="after warm-up")


class TrainConfig(Section):
    """The training loop."""

    steps: int | None = Field(default=None, gt=0, description="optimizer steps; none: from epochs")
    epochs: float = Field(default=1.0, gt=0, description="passes over the data when steps is not given")
    batch_size: Positive = Field(default=64, description="rows per optimizer step, over all devices")
    microbatches: Positive = Field(default=1, description="gradient accumulation: parts that a batch is split into")
    parameters: Literal["adapters", "routers", "all"] = Field(
        default="adapters", description="adapters: LoRA and routers; routers only; all"
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="optimizer and schedule")
    distillation: DistillationConfig = Field(
        default=DistillationConfig(), description="distillation from the dense model"
    )
    quantization_aware: QuantizationAwareConfig = Field(
        default=QuantizationAwareConfig(), description="train under the quantizer"
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of matmuls outside float32 islands"
    )
    remat: Literal["none", "dots", "full"] = Field(default="none", description="what the backward pass recomputes")
    log_every: Positive = Field(default=20, description="steps between log lines")
    wandb_project: str | None = Field(
        default=None,
        description="W&B project to log to as well (extra `wandb`); none: TensorBoard only",
    )
    evaluate_every: int = Field(default=0, ge=0, description="steps between validations; 0: only at the end")
    evaluate_batches: Positive = Field(default=8, description="batches per validation")
    checkpoint_every: Positive = Field(default=200, description="steps between checkpoints")
    keep_checkpoints: Positive = Field(default=2, description="newest checkpoints kept, beside the best")
    merge_lora: bool = Field(default=True, description="fold adapters into the weights of the model that is written")


class MeshConfig(Section):
    """Devices along each axis; one of them may be -1: what is left."""

    data: int = Field(default=-1, ge=-1, description="data parallel, parameters replicated")
    fsdp: int = Field(default=1, ge=-1, description="data parallel, parameters sharded")
    tensor: int = Field(default=1, ge=-1, description="heads and MLP width sharded")

    @model_validator(mode="after")
    def _check(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes:
            raise ValueError(f"axis sizes are positive or -1, found {sizes}")
        if sizes.count(-1) > 1:
            raise ValueError(f"only one axis can be -1, found {sizes}")
        return self


class QuantizationRuleConfig(Section):
    """Another format for some of the linears; where several rules match, the last one counts."""

    match: str = Field(description="pattern over LAYER/LINEAR: 0/*, */down, [0-3]/query")
    bits: Bits | None = Field(default=None, description="bits per weight; 16: left in floating point")
    group_size: GroupSize | None = Field(default=None, description="inputs per scale")
    symmetric: bool | None = Field(default=None, description="no zero point")


class StatisticsConfig(Section):
    """What a quantizer that needs activations sees: rows of the calibration split, run through the quantized prefix."""

    examples: Positive = Field(default=128, description="calibration examples")
    batch_size: Positive = Field(default=8, description="rows that are run at once")
    executed_only: bool = Field(default=True, description="only tokens that execute a layer count in its statistics")
    min_rows: int = Field(
        default=1024, ge=0, description="tokens that every layer sees at least: filled up with tokens that skip it"
    )


class AWQConfig(Section):
    """AWQ: scales from activations, folded into the neighbouring norms and linears, and clipped ranges."""

    grid: Positive = Field(default=20, description="exponents, and clip factors, that are tried")
    clip: bool = Field(default=True, description="search for a smaller range per group")


class GPTQConfig(Section):
    """GPTQ: column by column, the error of a column is made up for by the columns after it."""

    damping: float = Field(default=0.01, gt=0, description="added to the Hessian's diagonal, times its mean")
    attempts: Positive = Field(default=4, description="factorizations tried, each with ten times the damping")
    activation_order: bool = Field(default=True, description="most active inputs first; groups stay where they are")
    clip: bool = Field(default=True, description="search for a smaller range per group first, as AWQ does")


class MagRConfig(Section):
    """MagR: weights are moved to smaller maxima where the calibration data does not see it."""

    strength: float | None = Field(
        default=None, gt=0, description="alpha over the RMS of the weights; default: 0.02 per channel, 0.005 in groups"
    )
    iterations: Positive = Field(default=200, description="proximal gradient steps")
    last_sample_only: bool = Field(
        default=False, description="activations of the last calibration row only, as the reference does"
    )

    def strength_for(self, group_size: int) -> float:
        """Alpha over the RMS of the weights, for one maximum per channel or per group."""
        return self.strength or (0.02 if group_size == -1 else 0.005)


CALIBRATED = ("awq", "gptq", "magr", "magr+gptq")
"""Quantizers that look at activations."""


class QuantizeConfig(Section):
    """Post-training quantization of the seven linears of each layer."""

    model: str | None = Field(default=None, description="model directory to read; default: OUTPUT/trained")
    output: str | None = Field(default=None, description="model directory to write; default: OUTPUT/<method>-<bits>bit")
    method: Literal["none", "rtn", "awq", "gptq", "magr", "magr+gptq"] = Field(
        default="rtn", description="rtn: round to nearest; magr: MagR, then rtn; none: bits must be 16"
    )
    bits: Bits = Field(default=4, description="bits per weight")
    group_size: GroupSize = Field(default=-1, description="inputs per scale; -1: one scale per output channel")
    symmetric: bool = Field(default=False, description="no zero point")
    scale_dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="type of the scales")
    activation_bits: Literal[8, 16] = Field(
        default=16, description="8: activations rounded per token, integer dots (weights of 4 or 8 bits)"
    )
    rules: Many[QuantizationRuleConfig] = Field(default=(), description="other formats for some linears")
    embedding_bits: Literal[8, 16] = Field(default=16, description="bits of the embedding, which may be the head too")
    head_bits: Literal[8, 16] = Field(default=16, description="bits of a head that is not the embedding")
    router_bits: Literal[8, 16] = Field(default=16, description="bits of the routers' wide matrices")
    statistics: StatisticsConfig = Field(default=StatisticsConfig(), description="what the quantizer sees")
    awq: AWQConfig = Field(default=AWQConfig(), description="settings of awq")
    gptq: GPTQConfig = Field(default=GPTQConfig(), description="settings of gptq and magr+gptq")
    magr: MagRConfig = Field(default=MagRConfig(), description="settings of magr and magr+gptq")

    @model_validator(mode="after")
    def _check(self):
        if (self.bits == 16) != (self.method == "none"):
            raise ValueError(
                f"bits={self.bits} does not go with method={self.method!r}: 16 bits if and only if method is 'none'"
            )
        if self.bits == 16:
            others = ("rules", "activation_bits", "embedding_bits", "head_bits", "router_bits")
            if idle := [name for name in others if getattr(self, name) not in ((), 16)]:
                raise ValueError(
                    f"bits=16 leaves the model as it is, {idle[0]} would do nothing; "
                    "allowed: other bits, with rules of 16 for what stays in floating point"
                )
        widths = {self.bits, *(rule.bits for rule in self.rules if rule.bits)} - {16}
        if self.activation_bits == 8 and (narrow := sorted(widths - {4, 8})):
            raise ValueError(
                f"activation_bits=8 does not go with {narrow[0]}-bit weights, which have no integer dot; "
                "allowed: 4 or 8"
            )
        return self

    @property
    def sees_activations(self) -> bool:
        """Whether calibration data is needed."""
        return self.method in CALIBRATED


class CalibrateConfig(Section):
    """The threshold theta, found on calibration data."""

    model: str | None = Field(default=None, description="model directory to read; default: the quantized one")
    output: str | None = Field(default=None, description="model directory to write; default: <model>-calibrated")
    objective: Literal["ratio", "quality", "budget"] = Field(
        default="ratio",
        description="ratio: hit it; quality: smallest ratio near the best; budget: largest that is fast enough",
    )
    ratio: Fraction = Field(default=0.5, description="executed share asked for: all tokens, all layers")
    within: NotNegative = Field(
        default=0.5, description="quality: accuracy points (or percent of nats) that may be lost against the best"
    )
    tolerance: float = Field(
        default=0.005, gt=0, description="accepted distance from the asked share, or from the largest in the budget"
    )
    examples: Positive = Field(default=512, description="calibration examples")
    max_threshold: Fraction = Field(default=0.999, description="upper end of the search")


class EvaluateConfig(Section):
    """Accuracy, perplexity and cost of one model directory."""

    model: str | None = Field(default=None, description="model directory to read; default: the newest of this run")
    output: str | None = Field(default=None, description="JSON file to write; default: OUTPUT/evaluation/<model>.json")
    name: str | None = Field(default=None, description="model's name in results; default: its routing method")
    threshold: Fraction | None = Field(default=None, description="theta of all layers; default: the model's own")
    split: Literal["validation", "test"] = Field(default="test", description="split that is evaluated")
    tasks: Many[str] = Field(default=(), description="tasks that are asked; empty: those of data.tasks")
    max_examples: int | None = Field(default=None, gt=0, description="examples per task; default: all")
    batch_size: Positive = Field(default=64, description="rows per batch")
    normalize: bool = Field(default=True, description="accuracy by log-likelihood per token rather than its sum")
    perplexity: bool = Field(default=True, description="nats per token of the split")
    rouge: bool = Field(
        default=False,
        description="instructions: also write every response, greedily, and give its ROUGE (extra `eval`)",
    )
    max_new_tokens: Positive = Field(default=128, description="rouge: tokens of a written response at most")
    maps: int = Field(default=4, ge=0, description="examples whose layer-by-token execution is stored for the report")


class HarnessConfig(Section):
    """lm-evaluation-harness (extra `eval`): with tasks, `evaluate` runs it instead of its own measurements."""

    tasks: Many[str] = Field(
        default=(), description="names of its tasks or groups, YAML task files, .jsonl files of {query, choices, gold}"
    )
    include_path: str | None = Field(default=None, description="folder with YAML files of more tasks")
    num_fewshot: int | None = Field(default=None, ge=0, description="examples in the prompt; default: each task's own")
    limit: int | None = Field(default=None, gt=0, description="documents per task, the first ones; default: all")
    max_new_tokens: Positive = Field(default=256, description="tokens generated where a task does not say")
    chat_template: bool = Field(default=False, description="prompts as conversations, by the tokenizer's template")
    samples: bool = Field(default=False, description="also store every document's responses in the result file")

    @model_validator(mode="after")
    def _check(self):
        if not self.tasks and (idle := sorted(self.model_fields_set - {"tasks"})):
            defaults = type(self).model_fields
            if changed := [name for name in idle if getattr(self, name) != defaults[name].default]:
                raise ValueError(f"{changed[0]} would do nothing, as no tasks are given; allowed: tasks with it")
        return self


class GenerateConfig(Section):
    """Text from one model directory."""

    model: str | None = Field(default=None, description="model directory to read; default: the newest of this run")
    prompts: Many[str] = Field(default=(), description="prompts; empty: one empty prompt")
    max_new_tokens: Positive = Field(default=64, description="tokens to add")
    temperature: NotNegative = Field(default=0.0, description="0: greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus sampling")
    kv_cache: Literal["float", "int8"] = Field(
        default="float", description="cached keys and values: float, as activations; int8, rounded per token and head"
    )
    engine: Literal["skip", "masked"] = Field(
        default="skip", description="skip: only what executes is computed and kept; masked: the reference, for checks"
    )


class PointsConfig(Section):
    """Where one method is evaluated, besides its trained threshold."""

    ratios: Many[Fraction] = Field(default=(), description="executed shares")
    thresholds: Many[Fraction] = Field(default=(), description="thetas")


class ExperimentConfig(Section):
    """A grid of stages: base, fine-tunes, quantizers, seeds."""

    seeds: Many[Seed] = Field(default=(0,), description="one fine-tune per seed")
    workers: int = Field(
        default=1,
        ge=0,
        description="processes side by side, each with an equal share of the cores; 0: all stages in this process",
    )
    base: dict | None = Field(
        default=None, description="overrides for training the base from nothing; none: model.path is the base"
    )
    methods: dict[str, dict] = Field(
        default={"dense": {}, "dllm": {}, "qtale": {}},
        description="name -> overrides; a routing method's name sets it; 'dense' without overrides is the base",
    )
    quantizers: Many[QuantizeConfig] = Field(
        default=(QuantizeConfig(method="none", bits=16),), description="grid of quantizers"
    )
    ratios: Many[Fraction] = Field(
        default=(), description="executed shares at which every routed model is also evaluated"
    )
    thresholds: Many[Fraction] = Field(
        default=(), description="thetas, other than the trained one, at which every routed model is also evaluated"
    )
    points: dict[str, PointsConfig] = Field(
        default={}, description="method -> ratios and thresholds that it is evaluated at instead of the grid's"
    )
    held_out_tasks: Many[str] = Field(
        default=(), description="tasks that every model is asked once more, after everything else has been measured"
    )
    title: str = Field(default="QTALE-JAX", description="heading of the report")

    @model_validator(mode="after")
    def _check(self):
        for name, values in (("seeds", self.seeds), ("methods", self.methods), ("quantizers", self.quantizers)):
            if not values:
                raise ValueError(f"{name} is empty; allowed: one entry or more")
        for name, values in (("seeds", self.seeds), ("quantizers", self.quantizers)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has an entry twice; allowed: different entries")
        if unknown := sorted(self.points.keys() - self.methods.keys()):
            raise ValueError(f"points names {unknown[0]!r}, which is not one of methods: {', '.join(self.methods)}")
        if any(quantizer.model or quantizer.output for quantizer in self.quantizers):
            raise ValueError("quantizers name model or output, which the experiment sets; allowed: the other keys")
        return self


class Config(Section):
    """One experiment; `output` is the folder that holds everything it writes."""

    output: str = Field(default="runs/default", description="folder for models, logs and reports")
    seed: Seed = Field(default=0, description="seed of initialisation, data order, noise")
    model: ModelConfig = Field(default=ModelConfig(), description="starting point")
    routing: RoutingConfig = Field(default=RoutingConfig(), description="token-adaptive execution")
    lora: LoraConfig | None = Field(default=LoraConfig(), description="adapters; null: none")
    data: DataConfig = Field(default=DataConfig(), description="data")
    train: TrainConfig = Field(default=TrainConfig(), description="training")
    mesh: MeshConfig = Field(default=MeshConfig(), description="devices")
    distributed: DistributedConfig = Field(default=DistributedConfig(), description="processes")
    quantize: QuantizeConfig = Field(default=QuantizeConfig(), description="quantization")
    calibrate: CalibrateConfig = Field(default=CalibrateConfig(), description="threshold")
    budget: BudgetConfig = Field(default=BudgetConfig(), description="speed that theta is calibrated for")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="evaluation")
    harness: HarnessConfig = Field(default=HarnessConfig(), description="lm-evaluation-harness")
    generate: GenerateConfig = Field(default=GenerateConfig(), description="generation")
    serve: ServeConfig = Field(default=ServeConfig(), description="server")
    plan: PlanConfig = Field(default=PlanConfig(), description="planner")
    experiment: ExperimentConfig = Field(default=ExperimentConfig(), description="grid of stages")

    @model_validator(mode="after")
    def _check(self):
        check_combinations(self)
        return self
