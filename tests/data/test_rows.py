import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.data.rows import build_rows, empty_like, first_fit
from qtale_jax.data.tokens import Tokens

LENGTH = 12


@st.composite
def examples(draw):
    """Examples of 2 to LENGTH tokens, none of them 0, with any place where the loss may start."""
    sizes = draw(st.lists(st.integers(2, LENGTH), min_size=1, max_size=20))
    return [
        Tokens(draw(st.lists(st.integers(1, 99), min_size=n, max_size=n)), draw(st.integers(1, n - 1))) for n in sizes
    ]


@given(st.lists(st.integers(1, LENGTH), max_size=60), st.integers(1, 5))
def test_every_example_goes_to_one_row_with_room(lengths, open_rows):
    rows = first_fit(lengths, LENGTH, open_rows)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and sum(lengths[i] for i in row) <= LENGTH for row in rows)


@given(st.lists(st.integers(1, LENGTH), min_size=1, max_size=40))
def test_a_row_is_opened_only_when_no_earlier_one_has_room(lengths):
    rows = first_fit(lengths, LENGTH)
    for later in range(len(rows)):
        for earlier in range(later):
            assert sum(lengths[i] for i in rows[earlier]) + lengths[rows[later][0]] > LENGTH


def test_rows_that_are_closed_take_nothing_more():
    assert first_fit([9, 9, 3], LENGTH, open_rows=1) == [[0], [1, 2]]
    assert first_fit([9, 9, 3], LENGTH, open_rows=2) == [[0, 2], [1]]


@given(examples(), st.booleans())
def test_no_token_is_lost_and_nothing_crosses_examples(found, packing):
    rows = build_rows(found, LENGTH, packing)
    assert all(array.shape == (len(rows["tokens"]), LENGTH) for array in rows.values())
    assert rows["weights"].dtype == np.float32
    assert all(rows[name].dtype == np.int32 for name in ("tokens", "targets", "segment_ids"))
    recovered = []
    for tokens, targets, weights, segments in zip(
        rows["tokens"], rows["targets"], rows["weights"], rows["segment_ids"], strict=True
    ):
        present = np.flatnonzero(segments)
        assert list(present) == list(range(len(present)))  # padding is at the end only
        for name in (tokens, targets, weights):
            assert not name[len(present) :].any()
        assert list(np.unique(segments[present])) == list(range(1, segments.max() + 1))
        assert packing or segments.max() == 1
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert list(at) == list(range(at[0], at[-1] + 1))
            assert list(targets[at[:-1]]) == list(tokens[at[1:]])
            assert targets[at[-1]] == 0 and weights[at[-1]] == 0
            counted = np.flatnonzero(weights[at])
            assert set(weights[at]) <= {0.0, 1.0} and list(counted) == list(range(counted[0], len(at) - 1))
            recovered.append(Tokens(tokens[at].tolist(), int(counted[0]) + 1))
    assert sorted(recovered) == sorted(found)
    if not packing:
        assert recovered == found


def test_the_loss_starts_where_the_response_does():
    rows = build_rows([Tokens([5, 6, 7, 8, 9], 3)], 8, packing=False)
    np.testing.assert_array_equal(rows["targets"][0], [6, 7, 8, 9, 0, 0, 0, 0])
    np.testing.assert_array_equal(rows["weights"][0], [0, 0, 1, 1, 0, 0, 0, 0])


def test_padding_rows_are_zero():
    rows = build_rows([Tokens([5, 6], 1)], 4, packing=True)
    padding = empty_like(rows, 3)
    assert {n: (a.shape, a.dtype) for n, a in padding.items()} == {n: ((3, 4), a.dtype) for n, a in rows.items()}
    assert not any(array.any() for array in padding.values())
