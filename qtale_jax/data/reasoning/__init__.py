"""The embedded reasoning suite: generators, TFDS builder and tokenizer."""

from qtale_jax.data.reasoning.reasoning import (
    SPLITS,
    Reasoning,
    ReasoningConfig,
    decode,
    generate_splits,
    load,
    prepare,
    rows,
    split_of,
)
from qtale_jax.data.reasoning.tasks import MAX_TOKENS, TASKS, WORDS, Example, generate, stream, vocabulary
from qtale_jax.data.reasoning.tokenizer import tokenizer

__all__ = [
    "MAX_TOKENS",
    "SPLITS",
    "TASKS",
    "WORDS",
    "Example",
    "Reasoning",
    "ReasoningConfig",
    "decode",
    "generate",
    "generate_splits",
    "load",
    "prepare",
    "rows",
    "split_of",
    "stream",
    "tokenizer",
    "vocabulary",
]
