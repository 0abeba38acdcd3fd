"""The sections of training: losses, optimizer, devices."""

from typing import Literal

from pydantic import Field, model_validator

from qtale_jax.config.section import Fraction, GroupSize, Many, NotNegative, Positive, Section


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
    skipped_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="training skips: share of the skipped tokens that are computed, for routers to learn; none: masked",
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
