"""Records -> token ids and the positions whose loss counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qtale_jax.config.schema import Config, DataConfig
from qtale_jax.data import reasoning
from qtale_jax.data.records import Choice, Document, Instruction, Record, is_continuous
from qtale_jax.data.sources import read
from qtale_jax.errors import InputError


class Tokens(NamedTuple):
    """Token ids of one example, and the index of the first token that is learned or scored (at least 1)."""

    ids: list[int]
    start: int


class Counts(NamedTuple):
    """Examples read, cut to `data.length`, and left out, as they were longer or had no token to learn within it."""

    read: int
    truncated: int
    dropped: int


TOKENIZERS = {"reasoning": "basic", "reasoning-study": "study"}
"""Names of the embedded tokenizers, and their suites."""


def load_tokenizer(name: str) -> Any:
    """An embedded tokenizer by name, or the one in a directory.

    Raises:
        InputError: the directory has no tokenizer files, or damaged ones.
    """
    if name in TOKENIZERS:
        return reasoning.tokenizer(TOKENIZERS[name])
    from qtale_jax.artifact import load_tokenizer as from_directory

    tokenizer = from_directory(name) if Path(name).is_dir() else None
    if tokenizer is None:
        raise InputError(
            f"model.tokenizer={name!r}: no tokenizer.json there; "
            f"allowed: a directory with one, or {', '.join(map(repr, TOKENIZERS))}"
        )
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text with exactly one beginning-of-sequence token, if the tokenizer has one, and no end token.

    Raises:
        InputError: a text has words outside a closed vocabulary.
    """
    if not texts:
        return []
    try:
        encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raises a bare Exception for what it cannot encode
        raise InputError(
            f"the tokenizer cannot encode some of the text ({error}), for example {texts[0][:60]!r}"
        ) from error
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [start + ids for ids in encoded]


def decode(tokenizer: Any, ids: Sequence[int], ends: Sequence[int] = ()) -> str:
    """Text of ids, without special tokens, and without those that end a continuation, which are none to everybody."""
    return tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True)


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]], end: bool = False) -> list[Tokens]:
    """Ids of context + continuation and where the continuation starts, for each pair.

    The whole text is encoded at once and the boundary is the length of the encoded context; space at the end of the
    context belongs to the continuation, as tokens start with their space (as in lm-evaluation-harness).
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = encode(tokenizer, [context + continuation for context, continuation in pairs])
    prefixes = encode(tokenizer, contexts)
    tail = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    return [
        Tokens(whole + tail, max(min(len(prefix), len(whole) - 1), 1))
        for whole, prefix in zip(wholes, prefixes, strict=True)
    ]


def tokenize(records: Sequence[Record], tokenizer: Any, loss_on: str) -> list[Tokens]:
    """Training examples: prompt, response, end token; the loss starts at the response or at the first prediction."""
    if isinstance(records[0], Document):
        texts = encode(tokenizer, [record.text for record in records if isinstance(record, Document)])
        end = [] if is_continuous(records) else _end(tokenizer)
        return [Tokens(ids + end, 1) for ids in texts]
    found = encode_pairs(tokenizer, [_prompt_and_response(record) for record in records], end=True)
    return found if loss_on == "response" else [Tokens(tokens.ids, 1) for tokens in found]


def _prompt_and_response(record: Record) -> tuple[str, str]:
    if isinstance(record, Choice):
        return record.query, " " + record.choices[record.gold]
    if isinstance(record, Instruction):
        return record.prompt, record.response
    raise TypeError(f"{type(record).__name__} has no prompt")


def _end(tokenizer: Any) -> list[int]:
    """The end token, unless it is also the one that starts a sequence (as for stories260k)."""
    same = tokenizer.eos_token_id == tokenizer.bos_token_id
    return [] if same or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def truncate(examples: Sequence[Tokens], config: DataConfig) -> tuple[list[Tokens], Counts]:
    """Applies `data.truncation` to examples longer than `data.length`.

    Returns:
        What stays, and how many examples were read, cut and left out.

    Raises:
        InputError: the policy is "error" and an example is too long, or nothing is left.
    """
    kept, truncated = [], 0
    for index, example in enumerate(examples):
        if len(example.ids) <= config.length:
            kept.append(example)
            continue
        if config.truncation == "error":
            raise InputError(
                f"data: example {index + 1} has {len(example.ids)} tokens, more than data.length={config.length}; "
                "raise it, or set data.truncation to 'right' or 'drop'"
            )
        if config.truncation == "right" and example.start < config.length:
            truncated += 1
            kept.append(Tokens(example.ids[: config.length], example.start))
    if not kept:
        raise InputError(f"data: all {len(examples)} examples are longer than data.length={config.length} tokens")
    return kept, Counts(len(examples), truncated, len(examples) - len(kept))


def examples(config: Config, tokenizer: Any, split: str) -> tuple[list[Tokens], Counts]:
    """Tokenized, length-checked examples of a split, and how many were read, truncated and dropped."""
    records = read(config.data, split)
    found = tokenize(records, tokenizer, config.data.loss_on)
    if is_continuous(records) or (isinstance(records[0], Document) and config.data.packing):
        return pieces(found, config.data.length), Counts(len(found), 0, 0)
    return truncate(found, config.data)


def pieces(documents: Sequence[Tokens], length: int) -> list[Tokens]:
    """Cuts long documents into pieces of at most `length`; short documents stay whole.

    A single token that is left over has nothing to predict it from and is dropped.
    """
    cut = [Tokens(d.ids[i : i + length], 1) for d in documents for i in range(0, len(d.ids), length)]
    return [piece for piece in cut if len(piece.ids) > 1]
