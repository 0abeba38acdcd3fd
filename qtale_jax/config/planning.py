"""The section of the planner."""

from typing import Literal

from pydantic import Field

from qtale_jax.config.section import Fraction, Many, Positive, Section


class PlanConfig(Section):
    """What training and inference would take on accelerators, from shapes: memory, arithmetic, time."""

    model: str | None = Field(
        default=None,
        description="a published size such as llama-3.1-8b, a folder in Hugging Face layout (only config.json is read) "
        "or a model directory; default: model.path, or model.architecture",
    )
    topology: str = Field(
        default="v5e:2x4", description="device kind and how many: v5e:4x4, v5p:2x2x2, v6e:2x4, h100:8, h200:8, a100:8"
    )
    usable: Fraction = Field(
        default=0.92,
        description="share of a device's memory that arrays may take; the rest is for programs and runtime",
    )
    batch_sizes: Many[Positive] = Field(default=(1, 32), description="inference: rows that run at the same time")
    context: Positive | None = Field(
        default=None, description="inference: tokens of a row, prompt and new ones; default: data.length"
    )
    compile: Many[Literal["train", "proposal", "prefill", "decode"]] = Field(
        default=("train", "prefill", "decode"),
        description="steps that are also compiled for a TPU topology where libtpu is installed (extra `aot`); "
        "proposal: the training step on the smallest topology that is proposed",
    )
    output: str | None = Field(default=None, description="JSON file to write; default: OUTPUT/plan.json")
