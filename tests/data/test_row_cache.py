import numpy as np
import pytest

from qtale_jax.data import pipeline, reasoning, row_cache, sources
from qtale_jax.data.rows import NAMES
from qtale_jax.data.tokens import Counts, load_tokenizer


@pytest.fixture
def config(config_of, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "STORED", {"basic": "small", "study": "study_small"})
    return config_of(kind="reasoning", path=str(tmp_path))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("reasoning")


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def test_rows_that_were_kept_are_those_that_were_made(config, tokenizer, monkeypatch, caplog):
    with caplog.at_level("INFO"):
        made = pipeline.load_rows(config, tokenizer, "train", keep=True)
        monkeypatch.setattr(pipeline, "examples", lambda *_: pytest.fail("tokenized again"))
        kept = pipeline.load_rows(config, tokenizer, "train")
    assert equal(made, kept)
    assert {n: array.dtype for n, array in made.items()} == {n: array.dtype for n, array in kept.items()}
    said = [record.getMessage() for record in caplog.records if "examples read" in record.getMessage()]
    assert len(said) == 2 and said[0] == said[1]


def test_reading_alone_leaves_nothing_behind(config, tokenizer, tmp_path):
    reasoning.prepare(tmp_path, "small")
    before = sorted(tmp_path.rglob("*"))
    pipeline.load_rows(config, tokenizer, "train")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [
        {"length": 32},
        {"packing": True},
        {"loss_on": "all"},
        {"tasks": ("rank",)},
        {"max_examples": 9},
        {"suite": "study"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_rows_depend_on_names_another_file(config, tokenizer, change):
    changed = config.data.model_copy(update=change)
    assert row_cache.row_file(changed, tokenizer, "train") != row_cache.row_file(config.data, tokenizer, "train")


def test_another_split_or_tokenizer_names_another_file(config, tokenizer):
    files = {
        row_cache.row_file(config.data, t, split)
        for t in (tokenizer, reasoning.tokenizer("study"))
        for split in reasoning.SPLITS
    }
    assert len(files) == 2 * len(reasoning.SPLITS)


def test_files_that_a_user_may_change_are_not_kept(config, tokenizer):
    text = config.data.model_copy(update={"kind": "text", "path": "stories.txt"})
    assert row_cache.row_file(text, tokenizer, "train") is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not an archive"])
def test_a_damaged_file_is_made_again(config, tokenizer, content):
    file = row_cache.row_file(config.data, tokenizer, "validation")
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    made = pipeline.load_rows(config, tokenizer, "validation", keep=True)
    stored = row_cache.read_rows(file)
    assert stored is not None
    rows, counts = stored
    assert equal(rows, made) and counts.read == len(made["tokens"])


def test_whatever_bit_flips_rows_are_whole_or_none(tmp_path):
    file = tmp_path / "rows.npz"
    rows = {name: np.arange(200, dtype=np.int32).reshape(10, 20) for name in NAMES}
    row_cache.write_rows(file, rows, Counts(10, 0, 0))
    whole = file.read_bytes()
    damaged = 0
    for position in range(0, len(whole), 3):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        found = row_cache.read_rows(file)
        damaged += found is None
        assert found is None or equal(found[0], rows)
    assert damaged > len(whole) / 10
    file.write_bytes(whole)
    found = row_cache.read_rows(file)
    assert found is not None and equal(found[0], rows)


def test_a_folder_that_cannot_be_written_is_no_error(config, tokenizer, tmp_path):
    file = tmp_path / "a file" / "rows.npz"
    file.parent.write_text("in the way")
    row_cache.write_rows(file, {"tokens": np.zeros((1, 2), np.int32)}, Counts(1, 0, 0))
    assert not file.exists()
