"""Text that comes in pieces is the text of all tokens, whatever the pieces are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qtale_jax.data import reasoning
from qtale_jax.data.stops import possible_start
from qtale_jax.engine.text import RunningText


def byte_level() -> Tokenizer:
    """Every byte is a token, and so are a few words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "he", "Ġt", "Ġth", "Ġthe"])}
    found = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return found


BYTES, WORDS = byte_level(), reasoning.tokenizer()
DECODERS = {"bytes": BYTES.decode, "words": lambda ids: WORDS.decode(ids, skip_special_tokens=True)}


def pieces(running: RunningText, ids, cuts):
    """Everything that is given out, and how many tokens counted until it stopped."""
    given_out, counted = [], 0
    bounds = [0, *sorted(set(cuts)), len(ids)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        if start < end:
            piece = running.add(ids[start:end])
            given_out.append(piece.text)
            counted += piece.tokens
            if piece.stopped:
                return given_out, counted, True
    return [*given_out, running.end()], counted, False


@pytest.mark.parametrize(("kind", "size"), [("bytes", 260), ("words", 64)])
@given(data=st.data())
def test_pieces_are_the_whole(kind, size, data):
    decode = DECODERS[kind]
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=90))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=12))
    found, counted, stopped = pieces(RunningText(decode), ids, cuts)
    assert ("".join(found), counted, stopped) == (decode(ids), len(ids), False)


@given(
    text=st.text("ab é€😀 the", max_size=60),
    stops=st.lists(st.text("ab é€😀 the", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 80), max_size=12),
)
def test_it_ends_before_the_first_stop_string(text, stops, cuts):
    ids = BYTES.encode(text).ids
    found, counted, stopped = pieces(RunningText(BYTES.decode, stops), ids, [cut for cut in cuts if cut < len(ids)])
    places = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(places) and "".join(found) == (text[: min(places)] if places else text)
    if not stopped:
        assert counted == len(ids)
    else:
        assert any(stop in BYTES.decode(ids[:counted]) for stop in stops)
        assert not any(stop in BYTES.decode(ids[: counted - 1]) for stop in stops)


def test_characters_come_whole():
    running = RunningText(BYTES.decode)
    given_out = [running.add([token]).text for token in BYTES.encode("a😀b").ids]
    assert given_out == ["a", "", "", "", "😀", "b"]


def test_bytes_that_never_become_a_character_come_at_the_end():
    ids = BYTES.encode("a😀").ids[:-1]
    running = RunningText(BYTES.decode)
    assert running.add(ids).text == "a" and "a" + running.end() == BYTES.decode(ids)


def test_only_what_may_become_a_stop_string_waits():
    assert possible_start("the end", ("end.", "nd of")) == 4
    assert possible_start("the end", ("xyz",)) == 7
    assert possible_start("aab", ("abc", "bd")) == 1
    assert possible_start("anything", ()) == 8
