"""Behaviour of the reasoning suite: answers, distractors, splits, storage and tokenizer."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import sys
from typing import Any

import numpy as np
import pytest

from qtale_jax.data import reasoning

TASK_NAMES = ("rank", "boolean", "count", "keep", "without", "sum", "nearest")
SMALL_SIZES = {"train": 256, "calibration": 32, "validation": 32, "test": 64}


def _numbers(text: str) -> np.ndarray:
    return np.array([int(word) for word in text.split()])


def _sides(query: str) -> tuple[list[str], np.ndarray]:
    """Splits "HEAD : NUMBERS =" into the head's words and the numbers."""
    head, numbers = query.removesuffix(" =").split(" : ")
    return head.split(), _numbers(numbers)


def _answer_rank(query: str) -> str:
    ordinal, direction, *numbers = query.removesuffix(" =").split()
    place = {"first": 0, "second": 1, "third": 2}[ordinal]
    ascending = np.sort(_numbers(" ".join(numbers)))
    return str(ascending[place] if direction == "smallest" else ascending[-1 - place])


def _answer_boolean(query: str) -> str:
    words = query.removesuffix(" =").replace("not true", "0").replace("not false", "1")
    first, *rest = words.replace("true", "1").replace("false", "0").split()
    result = first
    for operator, literal in zip(rest[::2], rest[1::2], strict=True):
        # "or" with 1 and "and" with 0 decide; otherwise the left value stands.
        result = literal if (operator, literal) in {("or", "1"), ("and", "0")} else result
    return {"1": "yes", "0": "no"}[result]


def _answer_count(query: str) -> str:
    head, numbers = _sides(query)
    return str(np.count_nonzero(numbers > int(head[2])))


def _answer_keep(query: str) -> str:
    (_, direction, threshold), numbers = _sides(query)
    offsets = numbers - int(threshold)
    return " ".join(map(str, numbers[offsets < 0 if direction == "below" else offsets > 0]))


def _answer_without(query: str) -> str:
    head, numbers = _sides(query)
    return " ".join(map(str, numbers[~np.isin(numbers, _numbers(" ".join(head[1:])))]))


def _answer_sum(query: str) -> str:
    return str(_numbers(query.removeprefix("sum ").removesuffix(" =")).sum())


def _answer_nearest(query: str) -> str:
    head, numbers = _sides(query)
    distances = np.abs(numbers - int(head[1]))
    assert np.count_nonzero(distances == distances.min()) == 1
    return str(numbers[distances.argmin()])


ANSWERS = {
    "rank": _answer_rank,
    "boolean": _answer_boolean,
    "count": _answer_count,
    "keep": _answer_keep,
    "without": _answer_without,
    "sum": _answer_sum,
    "nearest": _answer_nearest,
}


@pytest.fixture(scope="module")
def examples() -> dict[str, list[reasoning.Example]]:
    return {task: reasoning.generate(task, 3_000, seed=1) for task in reasoning.TASKS}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the small configuration prepared."""
    directory = str(tmp_path_factory.mktemp("data"))
    reasoning.prepare(directory, "small")
    return directory


def test_the_suite_has_seven_tasks() -> None:
    assert tuple(reasoning.TASKS) == TASK_NAMES


@pytest.mark.parametrize("task", TASK_NAMES)
def test_gold_is_the_answer_and_every_other_choice_is_wrong(task: str, examples) -> None:
    for example in examples[task]:
        answer = ANSWERS[task](example["query"])
        assert example["choices"].count(answer) == 1
        assert example["choices"][example["gold"]] == answer
        assert len(set(example["choices"])) == len(example["choices"]) == (2 if task == "boolean" else 4)
        assert example["task"] == task


@pytest.mark.parametrize("task", TASK_NAMES)
def test_choices_of_an_example_have_equally_many_words(task: str, examples) -> None:
    # Then the plain and the length-normalised log-likelihood name the same choice.
    for example in examples[task]:
        assert len({len(choice.split()) for choice in example["choices"]}) == 1


@pytest.mark.parametrize("task", TASK_NAMES)
def test_gold_position_is_uniform(task: str, examples) -> None:
    num_choices = len(examples[task][0]["choices"])
    counts = np.bincount([example["gold"] for example in examples[task]], minlength=num_choices)
    expected = len(examples[task]) / num_choices
    # Chi-squared with at most 3 degrees of freedom exceeds 20 with probability under 2e-4.
    assert ((counts - expected) ** 2 / expected).sum() < 20


def test_numeric_distractors_are_off_by_at_most_three(examples) -> None:
    for example in examples["count"] + examples["sum"]:
        values = sorted(map(int, example["choices"]))
        assert values == list(range(values[0], values[0] + 4))


def test_list_distractors_differ_from_gold_in_one_member_or_one_swap(examples) -> None:
    for example in examples["keep"] + examples["without"]:
        gold = example["choices"][example["gold"]].split()
        for choice in example["choices"]:
            assert len(set(choice.split()) - set(gold)) <= 1


def test_both_boolean_answers_are_equally_frequent(examples) -> None:
    yes = np.mean([example["choices"][example["gold"]] == "yes" for example in examples["boolean"]])
    assert 0.45 < yes < 0.55


def test_words_are_in_the_vocabulary_and_sequences_are_short(examples) -> None:
    vocabulary = reasoning.SUITES["basic"].vocabulary()
    assert len(vocabulary) == len(reasoning.WORDS) <= 64
    longest = 0
    for example in sum(examples.values(), []):
        for choice in example["choices"]:
            words = example["query"].split() + choice.split()
            assert vocabulary.keys() >= set(words)
            longest = max(longest, len(words) + 2)  # <s> and </s>
        assert example["query"].endswith(" =")
    assert longest == reasoning.MAX_TOKENS <= 24


def test_every_word_is_used(examples) -> None:
    used = {word for example in sum(examples.values(), []) for word in [*example["query"].split(), *example["choices"]]}
    assert used >= set(reasoning.WORDS) - {"<pad>", "<s>", "</s>"}


def test_seed_determines_the_examples() -> None:
    for task in reasoning.TASKS:
        assert reasoning.generate(task, 20, seed=3) == reasoning.generate(task, 20, seed=3)
        assert reasoning.generate(task, 20, seed=3) != reasoning.generate(task, 20, seed=4)
        assert reasoning.generate(task, 10, seed=3) == reasoning.generate(task, 20, seed=3)[:10]


def test_generator_is_stable_across_versions() -> None:
    # Published numbers refer to these examples: a change here needs a new version of the data set.
    assert reasoning.generate("rank", 1, seed=0) == [
        {
            "task": "rank",
            "query": "second largest 2 11 25 21 10 4 =",
            "choices": ["11", "10", "21", "25"],
            "gold": 2,
        }
    ]


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'rnak'; the tasks are rank, boolean"):
        reasoning.generate("rnak", 1, seed=0)


def test_split_depends_on_the_query_alone() -> None:
    assert reasoning.split_of("sum 1 2 3 4 5 =") == "train"
    queries = [example["query"] for example in reasoning.generate("rank", 4_000, seed=5)]
    shares = collections.Counter(map(reasoning.split_of, queries))
    assert set(shares) == set(reasoning.SPLITS)
    assert shares["train"] / len(queries) == pytest.approx(0.80, abs=0.03)
    assert shares["test"] / len(queries) == pytest.approx(0.10, abs=0.02)


@pytest.mark.slow
def test_full_sized_splits_are_disjoint_balanced_and_without_repetition() -> None:
    config = next(config for config in reasoning.Reasoning.BUILDER_CONFIGS if config.name == "full")
    sizes = {split: getattr(config, split) for split in reasoning.SPLITS}
    splits = reasoning.generate_splits(sizes, config.seed)
    queries = [example["query"] for split in splits.values() for example in split]
    assert len(queries) == len(set(queries)) == 7 * sum(sizes.values())
    for split, members in splits.items():
        assert all(reasoning.split_of(example["query"]) == split for example in members)
        assert [example["task"] for example in members] == list(TASK_NAMES) * sizes[split]


@pytest.mark.slow
def test_sizes_beyond_the_query_space_are_refused(monkeypatch) -> None:
    only_sum = dataclasses.replace(reasoning.SUITES["basic"], tasks={"sum": reasoning.TASKS["sum"]})
    monkeypatch.setitem(reasoning.SUITES, "basic", only_sum)
    with pytest.raises(ValueError, match="task 'sum' has too few distinct queries"):
        reasoning.generate_splits({"test": 2_500}, seed=0)


def test_data_source_gives_back_the_generated_examples_in_order(data_dir: str) -> None:
    expected = reasoning.generate_splits(SMALL_SIZES, seed=0)
    for split, size in SMALL_SIZES.items():
        source = reasoning.load(data_dir, split, "small")
        assert len(source) == 7 * size
        assert [reasoning.decode(source[i]) for i in range(len(source))] == expected[split]


def test_rows_address_one_task(data_dir: str) -> None:
    source = reasoning.load(data_dir, "test", "small")
    for task in reasoning.TASKS:
        indices = reasoning.rows(task, len(source))
        assert len(indices) == SMALL_SIZES["test"]
        assert {reasoning.decode(source[i])["task"] for i in indices} == {task}


def test_slices_of_a_split_can_be_loaded(data_dir: str) -> None:
    assert len(reasoning.load(data_dir, "test[:70]", "small")) == 70


def test_second_load_reads_the_files_and_does_not_write(data_dir: str, tmp_path_factory, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("generated again")

    monkeypatch.setattr(reasoning.Reasoning, "_split_generators", refuse)
    assert len(reasoning.load(data_dir, "validation", "small")) == 7 * SMALL_SIZES["validation"]


@pytest.mark.slow
def test_two_processes_may_prepare_at_once(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=reasoning.prepare, args=(str(tmp_path), "small")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["reasoning"]
    assert len(reasoning.load(tmp_path, "test", "small")) == 7 * SMALL_SIZES["test"]


def test_loser_of_a_race_uses_the_winners_files(tmp_path, monkeypatch) -> None:
    original: Any = reasoning.Reasoning.download_and_prepare

    def another_process_is_first(self, **kwargs):
        monkeypatch.setattr(reasoning.Reasoning, "download_and_prepare", original)
        reasoning.prepare(tmp_path, "small")
        original(self, **kwargs)

    monkeypatch.setattr(reasoning.Reasoning, "download_and_prepare", another_process_is_first)
    assert reasoning.prepare(tmp_path, "small").is_prepared()
    assert [path.name for path in tmp_path.iterdir()] == ["reasoning"]


def test_failed_preparation_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("no space left")

    monkeypatch.setattr(reasoning.Reasoning, "_generate_examples", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        reasoning.prepare(tmp_path, "small")
    assert not list(tmp_path.rglob("*"))


def test_storage_needs_no_tensorflow(data_dir: str) -> None:
    builder = reasoning.prepare(data_dir, "small")
    assert builder.info.file_format is not None and builder.info.file_format.value == "array_record"
    assert "tensorflow" not in sys.modules


def test_tokenizer_has_one_token_per_word_and_starts_with_bos() -> None:
    tokenizer = reasoning.tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == len(reasoning.WORDS)
    assert tokenizer.get_vocab() == reasoning.SUITES["basic"].vocabulary()
    text = "keep above 12 : 18 9 8 30 29 2 17 10 ="
    tokens = tokenizer(text).input_ids
    assert tokens == [1, *(reasoning.SUITES["basic"].vocabulary()[word] for word in text.split())]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert tokenizer("18 30", add_special_tokens=False).input_ids == [21, 33]


def test_tokenizer_pads_on_the_right() -> None:
    batch = reasoning.tokenizer()(["sum 1 2 =", "3"], padding=True)
    assert batch.input_ids[1] == [1, 6, 0, 0, 0]
    assert batch.attention_mask[1] == [1, 1, 0, 0, 0]


def test_tokenizer_refuses_words_outside_the_vocabulary() -> None:
    with pytest.raises(Exception, match="WordLevel error"):
        reasoning.tokenizer()("sum 1 banana =")


def test_tokenizer_survives_saving(tmp_path) -> None:
    tokenizer = reasoning.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("sum 1 2 =").input_ids == tokenizer("sum 1 2 =").input_ids
    assert again.eos_token == "</s>"
