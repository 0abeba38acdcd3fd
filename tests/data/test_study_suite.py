"""Behaviour of the study suite: answers, distractors, what is held out, and that it stands beside the basic suite."""

from __future__ import annotations

import numpy as np
import pytest

from qtale_jax.config.schema import DataConfig
from qtale_jax.data import reasoning
from qtale_jax.data.sources import read
from qtale_jax.data.tokens import load_tokenizer
from qtale_jax.errors import InputError

STUDY = reasoning.SUITES["study"]
HELD_OUT = ("median", "rotate", "spread")
OPEN = ("rank", "boolean", "sort", "keep", "without", "sum", "nearest", "reverse")
SMALL_SIZES = {"train": 256, "calibration": 32, "validation": 32, "test": 64}


def numbers_of(text: str) -> np.ndarray:
    return np.array([int(word) for word in text.split()])


def text_of(numbers) -> str:
    return " ".join(map(str, np.atleast_1d(numbers)))


def sides(query: str) -> tuple[list[str], np.ndarray]:
    """Splits "TASK WORDS... : NUMBERS =" into the words and the numbers."""
    head, numbers = query.removesuffix(" =").split(" : ")
    return head.split()[1:], numbers_of(numbers)


def plain(query: str) -> np.ndarray:
    """The numbers of "TASK NUMBERS ="."""
    return numbers_of(query.removesuffix(" =").split(" ", 1)[1])


def answer_rank(query: str) -> str:
    ordinal, direction, *numbers = query.removesuffix(" =").split()
    place = ("first", "second", "third", "fourth", "fifth").index(ordinal)
    ascending = np.sort(numbers_of(" ".join(numbers)))
    return str(ascending[place] if direction == "smallest" else ascending[-1 - place])


def answer_boolean(query: str) -> str:
    """What Python says once every step from the left has its parentheses."""
    words = query.removesuffix(" =").replace("not true", "False").replace("not false", "True").replace("xor", "^")
    first, *rest = words.replace("true", "True").replace("false", "False").split()
    expression = first
    for operator, literal in zip(rest[::2], rest[1::2], strict=True):
        expression = f"({expression} {operator} {literal})"
    return "yes" if eval(expression) else "no"


def answer_keep(query: str) -> str:
    (direction, threshold), numbers = sides(query)
    offsets = numbers - int(threshold)
    kept = numbers[offsets < 0 if direction == "below" else offsets > 0]
    assert len(kept) == 3
    return text_of(kept)


def answer_without(query: str) -> str:
    named, numbers = sides(query)
    return text_of(numbers[~np.isin(numbers, numbers_of(" ".join(named)))])


def answer_nearest(query: str) -> str:
    (target,), numbers = sides(query)
    distances = np.abs(numbers - int(target))
    assert np.count_nonzero(distances == distances.min()) == 1
    return str(numbers[distances.argmin()])


def answer_rotate(query: str) -> str:
    (shift,), numbers = sides(query)
    return text_of(np.roll(numbers, -int(shift)))


ANSWERS = {
    "rank": answer_rank,
    "boolean": answer_boolean,
    "sort": lambda query: text_of(np.sort(plain(query))),
    "keep": answer_keep,
    "without": answer_without,
    "sum": lambda query: str(plain(query).sum()),
    "nearest": answer_nearest,
    "reverse": lambda query: text_of(np.flip(plain(query))),
    "median": lambda query: str(int(np.median(plain(query)))),
    "rotate": answer_rotate,
    "spread": lambda query: str(np.ptp(plain(query))),
}


@pytest.fixture(scope="module")
def examples() -> dict[str, list[reasoning.Example]]:
    return {task: reasoning.generate(task, 1_500, seed=1, suite="study") for task in STUDY.tasks}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("study"))
    reasoning.prepare(directory, "study_small")
    return directory


def test_three_of_eleven_tasks_are_held_out() -> None:
    assert tuple(STUDY.tasks) == OPEN + HELD_OUT
    assert STUDY.held_out == HELD_OUT and reasoning.SUITES["basic"].held_out == ()


@pytest.mark.parametrize("task", STUDY.tasks)
def test_gold_is_the_answer_and_every_other_choice_is_wrong(task: str, examples) -> None:
    for example in examples[task]:
        answer = ANSWERS[task](example["query"])
        assert example["choices"][example["gold"]] == answer
        assert len(set(example["choices"])) == len(example["choices"]) == (2 if task == "boolean" else 4)
        assert example["task"] == task


@pytest.mark.parametrize("task", STUDY.tasks)
def test_choices_have_equally_many_words_and_gold_stands_anywhere(task: str, examples) -> None:
    places = len(examples[task][0]["choices"])
    for example in examples[task]:
        assert len({len(choice.split()) for choice in example["choices"]}) == 1
    counts = np.bincount([example["gold"] for example in examples[task]], minlength=places)
    expected = len(examples[task]) / places
    # Chi-squared with at most 3 degrees of freedom exceeds 20 with probability under 2e-4.
    assert ((counts - expected) ** 2 / expected).sum() < 20


@pytest.mark.parametrize("task", ["sort", "reverse", "rotate"])
def test_wrong_lists_are_one_exchange_of_neighbours_away(task: str, examples) -> None:
    for example in examples[task]:
        gold = numbers_of(example["choices"][example["gold"]])
        for place, choice in enumerate(example["choices"]):
            (differs,) = np.nonzero(numbers_of(choice) != gold)
            assert place == example["gold"] or (len(differs) == 2 and differs[1] == differs[0] + 1)
            assert sorted(numbers_of(choice)) == sorted(gold)


@pytest.mark.parametrize("task", ["keep", "without"])
def test_wrong_selections_differ_in_one_member_or_one_exchange(task: str, examples) -> None:
    for example in examples[task]:
        gold = example["choices"][example["gold"]].split()
        assert all(len(set(choice.split()) - set(gold)) <= 1 for choice in example["choices"])


@pytest.mark.parametrize("task", ["sum", "spread"])
def test_wrong_numbers_are_off_by_at_most_three(task: str, examples) -> None:
    for example in examples[task]:
        values = sorted(map(int, example["choices"]))
        assert values == list(range(values[0], values[0] + 4))


@pytest.mark.parametrize("task", ["rank", "median"])
def test_wrong_ranks_are_near_the_right_one(task: str, examples) -> None:
    for example in examples[task]:
        words = example["query"].split()
        values = sorted(int(word) for word in words if word.isdigit())
        ranks = [values.index(int(choice)) for choice in example["choices"]]
        assert max(abs(rank - ranks[example["gold"]]) for rank in ranks) <= 3


def test_neither_boolean_answer_is_a_good_guess(examples) -> None:
    yes = np.mean([example["choices"][example["gold"]] == "yes" for example in examples["boolean"]])
    assert 0.45 < yes < 0.55


def test_words_are_in_the_vocabulary_all_are_used_and_sequences_are_short(examples) -> None:
    vocabulary, used, longest = STUDY.vocabulary(), set(), 0
    assert len(vocabulary) == len(STUDY.words) <= 128
    for example in sum(examples.values(), []):
        assert example["query"].endswith(" =")
        for choice in example["choices"]:
            words = example["query"].split() + choice.split()
            used |= set(words)
            longest = max(longest, len(words) + 2)  # <s> and </s>
    assert used == set(STUDY.words) - {"<pad>", "<s>", "</s>"}
    assert longest == STUDY.max_tokens == 16


def test_the_tokenizer_is_that_of_the_suite() -> None:
    found = load_tokenizer("reasoning-study")
    assert found.get_vocab() == STUDY.vocabulary() and found.model_max_length == STUDY.max_tokens
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)
    assert load_tokenizer("reasoning").get_vocab() == reasoning.SUITES["basic"].vocabulary()
    with pytest.raises(Exception, match="WordLevel error"):
        load_tokenizer("reasoning")("median 63 =")
    with pytest.raises(InputError, match="'reasoning', 'reasoning-study'"):
        load_tokenizer("reasoning-studdy")


def test_generator_is_stable_across_versions() -> None:
    # Published numbers refer to these examples: a change here needs a new version of the data set.
    assert reasoning.generate("rank", 1, seed=0, suite="study") == [
        {
            "task": "rank",
            "query": "second largest 16 36 27 8 44 23 =",
            "choices": ["44", "23", "36", "27"],
            "gold": 2,
        }
    ]


def test_tasks_of_one_suite_are_unknown_to_the_other() -> None:
    with pytest.raises(ValueError, match="unknown task 'median'; the tasks are rank, boolean, count, keep"):
        reasoning.generate("median", 1, seed=0)


def test_splits_are_disjoint_balanced_and_without_repetition() -> None:
    splits = reasoning.generate_splits(SMALL_SIZES, seed=0, suite="study")
    queries = [example["query"] for split in splits.values() for example in split]
    assert len(queries) == len(set(queries)) == 11 * sum(SMALL_SIZES.values())
    for split, members in splits.items():
        assert all(reasoning.split_of(example["query"]) == split for example in members)
        assert [example["task"] for example in members] == list(STUDY.tasks) * SMALL_SIZES[split]


def test_storage_gives_back_the_generated_examples(data_dir) -> None:
    source = reasoning.load(data_dir, "test", "study_small")
    expected = reasoning.generate_splits(SMALL_SIZES, seed=0, suite="study")["test"]
    assert [reasoning.decode(source[i]) for i in range(len(source))] == expected
    for task in STUDY.tasks:
        indices = reasoning.rows(task, len(source), "study")
        assert [expected[i]["task"] for i in indices] == [task] * SMALL_SIZES["test"]


@pytest.fixture
def study(data_dir, monkeypatch):
    """Reads the study suite through `data`, with the sizes for tests in the place of the full ones."""
    load = reasoning.load
    small = {"study": "study_small"}
    monkeypatch.setattr(reasoning, "load", lambda path, split, stored: load(path, split, small[stored]))

    def reader(split: str, **settings):
        return read(DataConfig.model_validate({"suite": "study", "path": data_dir, **settings}), split)

    return reader


def test_held_out_tasks_are_trained_but_not_looked_at(study) -> None:
    assert {record.task for record in study("train")} == set(STUDY.tasks)
    for split in ("calibration", "validation", "test"):
        found = study(split)
        assert {record.task for record in found} == set(OPEN)
        assert len(found) == 8 * SMALL_SIZES[split]


def test_held_out_tasks_are_there_for_who_names_them(study) -> None:
    found = study("test", tasks=["spread", "rank"])
    assert {record.task for record in found} == {"spread", "rank"} and len(found) == 2 * SMALL_SIZES["test"]
    assert {record.task for record in study("train", tasks=["sort"])} == {"sort"}


def test_fewer_training_examples_are_balanced(study) -> None:
    assert [record.task for record in study("train", max_examples=22)] == list(STUDY.tasks) * 2


def test_a_task_of_the_other_suite_is_refused(study, tmp_path) -> None:
    with pytest.raises(InputError, match="unknown task 'mediam'; allowed: .*did you mean 'median'"):
        study("test", tasks=["mediam"])
    with pytest.raises(InputError, match="unknown task 'median'"):
        read(DataConfig.model_validate({"path": str(tmp_path), "tasks": ["median"]}), "test")
