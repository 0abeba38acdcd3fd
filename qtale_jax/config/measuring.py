"""The sections of calibration, evaluation and generation."""

from typing import Literal

from pydantic import Field, model_validator

from qtale_jax.config.section import Fraction, Many, NotNegative, Positive, Section
from qtale_jax.models.specification import Kernels


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
    kernels: Kernels = Field(
        default="auto",
        description="products with stored weights and attention: xla; pallas, where it fits, on TPUs and GPUs; "
        "auto: pallas on a single GPU, xla elsewhere",
    )
