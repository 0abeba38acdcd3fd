"""Word-level tokenizer of the reasoning suite."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qtale_jax.data.reasoning.suites import SUITES
from qtale_jax.data.reasoning.tasks import BOS, EOS, PAD


def tokenizer(suite: str = "basic") -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per word of the suite, which starts every encoding with `<s>`.

    There is no unknown token: a word outside the vocabulary raises an exception instead of being scored silently.
    """
    words = SUITES[suite].vocabulary()
    backend = Tokenizer(WordLevel(words))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=SUITES[suite].max_tokens,
        clean_up_tokenization_spaces=False,
    )
