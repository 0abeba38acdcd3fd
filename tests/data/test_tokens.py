import pytest

from qtale_jax.config.schema import DataConfig
from qtale_jax.data import reasoning
from qtale_jax.data.sources import Choice, Document, Instruction
from qtale_jax.data.tokens import (
    Counts,
    Tokens,
    encode,
    encode_pairs,
    examples,
    load_tokenizer,
    pieces,
    tokenize,
    truncate,
)
from qtale_jax.errors import InputError


def ids_of(text: str) -> list[int]:
    """What the `letters` tokenizer gives for small letters, without the start."""
    return [ord(character) - ord("a") + 2 for character in text]


def test_every_text_starts_once(letters):
    assert encode(letters, ["ab", ""]) == [[0, 2, 3], [0]]
    assert encode(letters, []) == []
    for ids in encode(reasoning.tokenizer(), ["", next(iter(reasoning.WORDS))]):
        assert ids.count(reasoning.tokenizer().bos_token_id) == 1


def test_a_word_outside_a_closed_vocabulary_is_named():
    with pytest.raises(InputError, match="cannot encode.*'xylophone'"):
        encode(reasoning.tokenizer(), ["xylophone"])


def test_the_real_tokenizer_does_not_double_the_start(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "stories260k"))
    text = "Once upon a time, there was a little girl named Lily."
    (ids,) = encode(tokenizer, [text])
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    (document,) = tokenize([Document(text)], tokenizer, "all")
    assert document.ids.count(tokenizer.bos_token_id) == 1 and document.start == 1
    (pair,) = encode_pairs(tokenizer, [("Once upon a time,", " there was")])
    assert pair.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(pair.ids[pair.start :]).strip() == "there was"


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_directory_without_a_tokenizer_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="model.tokenizer="):
        load_tokenizer(name)


@pytest.mark.parametrize(
    ("context", "continuation", "start"),
    [("ab", "cd", 3), ("ab", " cd", 3), ("ab ", "cd", 3), ("ab  ", "cd", 3), ("", "cd", 1), ("", "c", 1)],
)
def test_the_continuation_starts_after_the_context_and_takes_its_space(letters, context, continuation, start):
    (found,) = encode_pairs(letters, [(context, continuation)])
    assert found.start == start
    assert found.ids == encode(letters, [context + continuation])[0]
    assert letters.decode(found.ids[: found.start]).replace("<s>", "").replace(" ", "") == context.strip()


def test_something_is_scored_even_without_a_continuation(letters):
    assert encode_pairs(letters, [("ab", "")]) == [Tokens([0, 2, 3], 2)]


def test_the_end_token_closes_training_examples_only(letters):
    assert encode_pairs(letters, [("a", "b")], end=True) == [Tokens([0, 2, 3, 1], 2)]
    assert encode_pairs(letters, [("a", "b")]) == [Tokens([0, 2, 3], 2)]


def test_examples_become_prompt_response_and_end(letters):
    choice = Choice("task", "ab", ("x", "cd"), 1)
    space = letters.convert_tokens_to_ids(" ")
    assert tokenize([choice], letters, "response") == [Tokens([0, 2, 3, space, 4, 5, 1], 3)]
    assert tokenize([choice], letters, "all") == [Tokens([0, 2, 3, space, 4, 5, 1], 1)]
    assert tokenize([Instruction("ab", "cd")], letters, "response") == [Tokens([0, *ids_of("abcd"), 1], 3)]
    assert tokenize([Document("abc")], letters, "response") == [Tokens([0, *ids_of("abc"), 1], 1)]


def config(**settings) -> DataConfig:
    return DataConfig.model_validate({"length": 4, **settings})


SHORT, EXACT, LONG, LATE = Tokens([1] * 3, 1), Tokens([2] * 4, 2), Tokens([3] * 6, 3), Tokens([4] * 6, 5)


def test_long_examples_are_dropped_cut_or_refused():
    assert truncate([SHORT, EXACT, LONG, LATE], config(truncation="drop")) == ([SHORT, EXACT], Counts(4, 0, 2))
    # An example whose response lies beyond the end has nothing to learn from.
    assert truncate([SHORT, EXACT, LONG, LATE], config(truncation="right")) == (
        [SHORT, EXACT, Tokens([3] * 4, 3)],
        Counts(4, 1, 1),
    )
    with pytest.raises(InputError, match="example 3 has 6 tokens, more than data.length=4"):
        truncate([SHORT, EXACT, LONG], config(truncation="error"))
    assert truncate([SHORT, EXACT], config(truncation="error")) == ([SHORT, EXACT], Counts(2, 0, 0))


@pytest.mark.parametrize("policy", ["drop", "right"])
def test_nothing_left_is_refused(policy):
    with pytest.raises(InputError, match="all 1 examples are longer than data.length=4"):
        truncate([LATE], config(truncation=policy))


def test_packed_documents_are_cut_into_pieces():
    assert pieces([Tokens(list(range(10)), 1)], 4) == [
        Tokens([0, 1, 2, 3], 1),
        Tokens([4, 5, 6, 7], 1),
        Tokens([8, 9], 1),
    ]
    # A single token left over predicts nothing.
    assert pieces([Tokens(list(range(9)), 1), Tokens([7, 8], 1)], 4)[-2:] == [
        Tokens([4, 5, 6, 7], 1),
        Tokens([7, 8], 1),
    ]


def test_packing_keeps_long_documents(letters, tmp_path, config_of):
    file = tmp_path / "text.txt"
    file.write_text("abcdefghij<|endoftext|>" * 10)
    packed, counts = examples(
        config_of(kind="text", path=str(file), length=8, packing=True, held_out=0.1), letters, "train"
    )
    assert counts == Counts(8, 0, 0) and {len(piece.ids) for piece in packed} == {8, 4}
    with pytest.raises(InputError, match="all 8 examples"):
        examples(config_of(kind="text", path=str(file), length=8, held_out=0.1), letters, "train")
