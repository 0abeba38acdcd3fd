import itertools
import json

import numpy as np
import pytest

from qtale_jax.data.pipeline import build_pipeline, from_rows
from qtale_jax.data.rows import build_rows
from qtale_jax.data.tokens import Tokens

COUNT, BATCH = 22, 8


@pytest.fixture(scope="module")
def rows():
    """Rows that can be told apart: row i starts with token i + 1."""
    return build_rows([Tokens([i + 1, 40, 41], 1) for i in range(COUNT)], 4, packing=False)


def take(pipeline, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(pipeline, count))


def firsts(batches) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["tokens"]]


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a
    )


def test_training_passes_over_everything_in_every_epoch_in_another_order(rows):
    # 22 rows in batches of 8: four epochs are eleven batches.
    order = firsts(take(from_rows(rows, "train", BATCH, seed=0), 11))
    epochs = [order[i * COUNT : (i + 1) * COUNT] for i in range(4)]
    assert all(sorted(epoch) == list(range(1, COUNT + 1)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order(rows):
    def order(seed: int) -> list[int]:
        return firsts(take(from_rows(rows, "train", BATCH, seed), 3))

    assert order(3) == order(3) != order(4)


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
def test_a_resumed_pipeline_continues_identically(rows, done):
    whole = from_rows(rows, "train", BATCH, seed=5)
    take(whole, done)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = from_rows(rows, "train", BATCH, seed=5)
    take(resumed, 2)  # where it was before does not matter
    resumed.set_state(state)
    assert same(take(resumed, 6), take(whole, 6))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("part", [[0, 1, 2, 3], [4, 5], [1, 6]], ids=str)
def test_a_process_gets_its_rows_of_the_global_batch(rows, split, part):
    whole = take(from_rows(rows, split, BATCH, seed=1), 3)
    mine = take(from_rows(rows, split, BATCH, 1, np.asarray(part)), 3)
    assert same(mine, [{name: array[part] for name, array in batch.items()} for batch in whole])


def test_other_splits_pass_once_and_pad_the_last_batch(rows):
    batches = list(from_rows(rows, "test", BATCH, seed=9))
    assert len(batches) == 3 and all(batch["tokens"].shape == (BATCH, 4) for batch in batches)
    assert firsts(batches) == [*range(1, COUNT + 1), 0, 0]
    for array in batches[-1].values():
        assert not array[-2:].any()
        assert array.dtype == batches[0][next(k for k, v in batches[-1].items() if v is array)].dtype


def test_a_set_smaller_than_a_batch(rows):
    few = {name: array[:3] for name, array in rows.items()}
    (batch,) = from_rows(few, "calibration", BATCH, seed=0)
    assert firsts([batch]) == [1, 2, 3, 0, 0, 0, 0, 0]
    assert set(firsts(take(from_rows(few, "train", BATCH, seed=0), 1))) == {1, 2, 3}


def test_from_file_to_batches(letters, tmp_path, config_of):
    file = tmp_path / "stories.txt"
    file.write_text("<|endoftext|>".join("abcdefghij"[i] * (i + 2) for i in range(10)))
    config = config_of(kind="text", path=str(file), length=16, held_out=0.2, packing=True, loss_on="all")
    pipeline = build_pipeline(config, letters, split="train", batch_size=2, seed=0)
    batch = next(pipeline)
    assert batch["tokens"].shape == (2, 16) and batch["weights"].sum() > 0
    assert batch["segment_ids"].max() > 1
    assert 1 < pipeline.size < 8  # rows, as packed


def test_cut_examples_are_counted_in_the_log(letters, tmp_path, config_of, caplog):
    file = tmp_path / "stories.txt"
    file.write_text("<|endoftext|>".join("abcd" * (1 + i % 3) for i in range(20)))
    config = config_of(kind="text", path=str(file), length=8, truncation="right")
    build_pipeline(config, letters, split="train", batch_size=2)
    assert "train: 16 examples read, 10 truncated to data.length=8, 0 dropped; 16 rows" in caplog.text
