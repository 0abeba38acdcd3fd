"""The sections of the model: what is started from, and its shape."""

from typing import Literal

from pydantic import Field, model_validator

from qtale_jax.config.section import Fraction, Positive, Section


class RopeScalingConfig(Section):
    """Scaling of the rotary frequencies, for contexts longer than the original one."""

    kind: Literal["llama3", "linear"] = Field(
        default="llama3", description="llama3: low frequencies are divided by factor; linear: all of them"
    )
    factor: float = Field(default=8.0, gt=0, description="how much longer than the original context")
    low_freq_factor: float = Field(
        default=1.0, gt=0, description="llama3: wavelengths above original_length / this are stretched by factor"
    )
    high_freq_factor: float = Field(
        default=4.0, gt=0, description="llama3: wavelengths below original_length / this are kept"
    )
    original_length: Positive = Field(default=8192, description="llama3: context of the unscaled model, tokens")

    @model_validator(mode="after")
    def _check(self):
        if self.kind == "linear":
            for name in ("low_freq_factor", "high_freq_factor", "original_length"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} would do nothing with kind='linear'; allowed: kind=llama3 with it")
        return self


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
    rope_scaling: RopeScalingConfig | None = Field(default=None, description="scaling of the rotary frequencies")
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
