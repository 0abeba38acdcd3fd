"""TFDS builder of the reasoning suite: generated locally, stored as ArrayRecord, no TensorFlow on either side."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qtale_jax.data.reasoning.suites import SUITES, stream
from qtale_jax.data.reasoning.tasks import Example

SPLITS = ("train", "calibration", "validation", "test")
# Upper ends of the splits' shares of hash space, in per cent. The shares follow the sizes, with room for the small
# query space of `sum` (16,807 queries), whose test share still holds more than the 1,000 that are asked for.
_SHARES = {"train": 80, "calibration": 85, "validation": 90, "test": 100}
# Draws in a row without a new query for an unfilled split after which the query space counts as exhausted.
_MAX_FRUITLESS_DRAWS = 5_000


@dataclasses.dataclass(kw_only=True)
class ReasoningConfig(tfds.core.BuilderConfig):
    """Which suite, how many examples each of its tasks contributes to each split, and from which seed.

    Prepared files are found again by the configuration's name alone: other sizes or another seed need another name.
    """

    suite: str = "basic"
    train: int = 12_000
    calibration: int = 512
    validation: int = 512
    test: int = 1_000
    seed: int = 0


def split_of(query: str) -> str:
    """Returns the split that a query belongs to: a function of its text alone, the same on every machine."""
    bucket = int.from_bytes(hashlib.blake2b(query.encode(), digest_size=8).digest(), "big") % 100
    return next(split for split, end in _SHARES.items() if bucket < end)


def generate_splits(sizes: Mapping[str, int], seed: int, suite: str = "basic") -> dict[str, list[Example]]:
    """Generates all splits; no query occurs twice, neither within a split nor across splits.

    Args:
      sizes: Examples per task of each split.
      seed: Seed of every task's stream.
      suite: A key of `SUITES`.

    Returns:
      For each split a list of `sizes[split]` examples per task in which the tasks alternate: example i is of task
      number i modulo the number of tasks, so any prefix is balanced and `rows` finds the examples of one task.
    """
    by_task: list[dict[str, list[Example]]] = []
    for task in SUITES[suite].tasks:
        splits: dict[str, list[Example]] = {split: [] for split in sizes}
        missing = sum(sizes.values())
        fruitless = 0
        seen: set[str] = set()
        examples = stream(task, seed, suite)
        while missing:
            example = next(examples)
            split = split_of(example["query"])
            if example["query"] in seen or len(splits.get(split, ())) == sizes.get(split, 0):
                fruitless += 1
                if fruitless == _MAX_FRUITLESS_DRAWS:
                    raise ValueError(f"task {task!r} has too few distinct queries for splits of sizes {dict(sizes)}")
                continue
            fruitless = 0
            seen.add(example["query"])
            splits[split].append(example)
            missing -= 1
        by_task.append(splits)
    return {
        split: [example for group in zip(*(splits[split] for splits in by_task), strict=True) for example in group]
        for split in sizes
    }


class Reasoning(tfds.core.GeneratorBasedBuilder):
    """Multiple-choice tasks over a closed vocabulary, with near-miss distractors: a basic suite and a harder one."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. Saying so keeps TFDS from searching for a checksum file, for
    # which it imports a package that it does not declare as a dependency.
    url_infos = None
    RELEASE_NOTES = {"1.0.0": "Tasks rank, boolean, count, keep, without, sum, nearest."}
    BUILDER_CONFIGS = [
        ReasoningConfig(name="full", description="12,000 / 512 / 512 / 1,000 examples per task."),
        ReasoningConfig(
            name="small",
            description="256 / 32 / 32 / 64 examples per task, for tests.",
            train=256,
            calibration=32,
            validation=32,
            test=64,
        ),
        ReasoningConfig(
            name="study", description="The study suite, 24,000 / 512 / 512 / 1,000.", suite="study", train=24_000
        ),
        ReasoningConfig(
            name="study_small",
            description="The study suite, 256 / 32 / 32 / 64 examples per task, for tests.",
            suite="study",
            train=256,
            calibration=32,
            validation=32,
            test=64,
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "task": tfds.features.Text(),
                    "query": tfds.features.Text(),
                    "choices": tfds.features.Sequence(tfds.features.Text()),
                    "gold": np.int64,
                }
            ),
            # The generator's order is meaningful: tasks alternate.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Example]]]:
        del dl_manager  # Nothing is downloaded.
        config = self.builder_config
        assert isinstance(config, ReasoningConfig)
        splits = generate_splits({split: getattr(config, split) for split in SPLITS}, config.seed, config.suite)
        return {split: self._generate_examples(examples) for split, examples in splits.items()}

    def _generate_examples(self, examples: Sequence[Example]) -> Iterator[tuple[int, Example]]:
        yield from enumerate(examples)


def is_prepared(data_dir: str | os.PathLike[str], config: str = "full") -> bool:
    """Whether the files of `config` are under `data_dir`; nothing is written."""
    return _builder(data_dir, config).is_prepared()


def prepare(data_dir: str | os.PathLike[str], config: str = "full") -> Reasoning:
    """Returns the builder of `config` under `data_dir`, its files generated unless they are there already.

    The files are written to a temporary directory beside their place and renamed into it, so a killed process leaves no
    half-written data set, and of two processes that prepare at once one wins and the other uses its files.
    """
    builder = _builder(data_dir, config)
    if builder.is_prepared():
        return builder
    root = pathlib.Path(data_dir)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".reasoning-", dir=root) as scratch:
        scratch_builder = _builder(scratch, config)
        tfds.disable_progress_bar()
        scratch_builder.download_and_prepare(download_dir=pathlib.Path(scratch) / "downloads")
        target = pathlib.Path(builder.data_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            pathlib.Path(scratch_builder.data_dir).rename(target)
        except OSError:
            # Another process was first: a directory that is not empty cannot be replaced.
            if not _builder(data_dir, config).is_prepared():
                raise
    return _builder(data_dir, config)


def _builder(data_dir: str | os.PathLike[str], config: str) -> Reasoning:
    return Reasoning(data_dir=os.fspath(data_dir), config=config, file_format="array_record")


def load(data_dir: str | os.PathLike[str], split: str, config: str = "full") -> Any:
    """Returns a random-access data source of one split, generating the data set first where it is absent.

    Args:
      data_dir: Directory for prepared data sets.
      split: One of `SPLITS`, or a slice of one in TFDS notation, such as "test[:700]".
      config: "full" (the basic suite), "study", or "small" and "study_small" for tests.

    Returns:
      A `tfds` data source whose items are dictionaries with `task` and `query` (bytes), `choices` (2 or 4 bytes
      objects) and `gold` (int); `decode` turns one into an `Example`.
    """
    # The decorators of TFDS hide the method's parameters from type checkers.
    return prepare(data_dir, config).as_data_source(split=split)  # pyright: ignore[reportCallIssue]


def rows(task: str, num_examples: int, suite: str = "basic") -> range:
    """Returns the indices of a task's examples in a whole split of `num_examples` examples."""
    names = list(SUITES[suite].tasks)
    return range(names.index(task), num_examples, len(names))


def decode(item: Mapping[str, Any]) -> Example:
    """Turns an item of a data source (bytes, NumPy scalars) into an `Example` of plain Python objects."""
    return Example(
        task=item["task"].decode(),
        query=item["query"].decode(),
        choices=[choice.decode() for choice in item["choices"]],
        gold=int(item["gold"]),
    )
