"""A character tokenizer: ids are easy to predict, and nothing is outside its vocabulary."""

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from qtale_jax.config.schema import Config

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .:#\n?"


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerFast:
    """One token per character: <s> 0, </s> 1, a 2, b 3, ...; others are <unk>."""
    words = {word: index for index, word in enumerate(["<s>", "</s>", *CHARACTERS, "<unk>"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def config_of():
    """Builds a configuration with the given data section."""

    def build(**data) -> Config:
        return Config.model_validate({"data": data})

    return build
