"""The embedded reasoning suites: generators, TFDS builder and tokenizers."""

from qtale_jax.data.reasoning.reasoning import (
    SPLITS,
    Reasoning,
    ReasoningConfig,
    decode,
    generate_splits,
    is_prepared,
    load,
    prepare,
    rows,
    split_of,
)
from qtale_jax.data.reasoning.suites import SUITES, Suite, generate, stream
from qtale_jax.data.reasoning.tasks import MAX_TOKENS, TASKS, WORDS, Example
from qtale_jax.data.reasoning.tokenizer import tokenizer

__all__ = [
    "MAX_TOKENS",
    "SPLITS",
    "SUITES",
    "TASKS",
    "WORDS",
    "Example",
    "Reasoning",
    "ReasoningConfig",
    "Suite",
    "decode",
    "generate",
    "generate_splits",
    "is_prepared",
    "load",
    "prepare",
    "rows",
    "split_of",
    "stream",
    "tokenizer",
]
