"""The section of data."""

from typing import Literal

from pydantic import Field, model_validator

from qtale_jax.config.section import Many, Section


class DataConfig(Section):
    """What is read, how it becomes tokens, how tokens become batches."""

    kind: Literal["reasoning", "text", "instruction", "multiple_choice", "published"] = Field(
        default="reasoning",
        description="format of the source; published: tasks, as TFDS or the datasets library has them",
    )
    path: str | None = Field(
        default=None,
        description="file or directory; reasoning: where the generated set is kept; published: folder of saved or "
        "prepared sets",
    )
    source: Literal["auto", "tfds", "datasets"] = Field(
        default="auto",
        description="published: whose copy is read. tfds: prepared as ArrayRecord, in path or TFDS's default folder; "
        "datasets: saved in path, or from the hub or its cache; auto: tfds where it is prepared, else datasets",
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
    separator: str = Field(default="<|endoftext|>", min_length=1, description="text: splits documents")
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
        if self.source != "auto" and self.kind != "published":
            raise ValueError(
                f"source={self.source!r} would do nothing with kind={self.kind!r}; allowed: kind=published"
            )
        if self.paths and self.kind not in ("instruction", "multiple_choice"):
            raise ValueError(f"paths does not go with kind={self.kind!r}; allowed: instruction or multiple_choice")
        if self.paths and self.path is not None:
            raise ValueError("path and paths are both given; allowed: one of them")
        return self
