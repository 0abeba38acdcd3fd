"""Text that comes in pieces is the text of all tokens, whatever the pieces are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from qtale_jax.data import reasoning
from qtale_jax.data.stops import possible_start
from qtale_jax.engine.text import RunningText, neighbours


def byte_level() -> Tokenizer:
    """Every byte is a token, and so are a few words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "he", "Ġt", "Ġth", "Ġthe"])}
    found = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return found


def spaces_before_words() -> Tokenizer:
    """As the SentencePiece models of Llama 2: a space is part of the next word, and of none before the first word."""
    words = ["▁a", "an", "▁an", "▁and", "th", "he", "▁th", "▁the"]
    vocabulary = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ahetnd", *words]
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("▁an", "d"), ("t", "h"), ("h", "e"), ("▁", "th"), ("▁th", "e")]
    ids = {token: index for index, token in enumerate(vocabulary)}
    found = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    found.add_special_tokens(["<s>"])
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return found


BYTES, WORDS, SPACES = byte_level(), reasoning.tokenizer(), spaces_before_words()
START = SPACES.token_to_id("<s>")
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


@pytest.mark.parametrize("tokenizer", [BYTES, SPACES], ids=["bytes", "spaces"])
@given(data=st.data())
def test_a_text_goes_on_from_its_prompt(tokenizer, data):
    text = data.draw(st.text("ab é€😀 the and", max_size=60))
    ids = tokenizer.encode(text).ids
    place = data.draw(st.integers(0, len(ids)))
    ids, place = ([START, *ids], place + 1) if tokenizer is SPACES else (ids, place)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=12))
    found, counted, _ = pieces(RunningText(tokenizer.decode, after=ids[:place]), ids[place:], cuts)
    before = tokenizer.decode(ids[:place])
    before = before if text.startswith(before) else before.rstrip("\ufffd")
    assert before + "".join(found) == text and counted == len(ids) - place


def test_the_space_between_a_prompt_and_its_continuation_stays():
    prompt, new = [START, *SPACES.encode("the hand").ids], SPACES.encode("and the").ids
    assert RunningText(SPACES.decode).add(new).text == "and the"
    assert RunningText(SPACES.decode, after=prompt).add(new).text == " and the"
    assert RunningText(SPACES.decode, ["d t"], after=prompt).add(new).text == " an"
    assert RunningText(SPACES.decode, [" a"], after=prompt).add(new).text == ""
    assert RunningText(SPACES.decode, after=[START]).add(new).text == "and the"
    assert RunningText(SPACES.decode, after=prompt).add([SPACES.token_to_id("he")]).text == "he"


def test_neighbours_have_text_and_begin_with_a_whole_character():
    for count in range(4):
        last, text = neighbours(SPACES.decode, SPACES.encode("😀" * 20 + "a" * count).ids)
        assert len(last) < 12 and text.strip("😀") == "a" * count
    marks = [*SPACES.encode("the").ids, *[START] * 100]
    assert neighbours(SPACES.decode, marks)[1] == "the"


def test_what_a_prompt_leaves_unfinished_is_finished_and_what_it_only_looks_like_stays():
    ids = BYTES.encode("a😀b").ids
    assert [RunningText(BYTES.decode, after=ids[:n]).add(ids[n:]).text for n in (1, 2, 3, 4, 5)] == [*["😀b"] * 4, "b"]
    running = RunningText(BYTES.decode, after=ids[:2])
    assert [running.add([token]).text for token in ids[2:]] == ["", "", "😀", "b"]
    written = BYTES.encode("a\ufffd").ids
    assert RunningText(BYTES.decode, after=written).add(BYTES.encode(" b😀").ids[:-1]).text == " b"
    assert RunningText(BYTES.decode, after=written).end() == ""


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
