"""Rows read, truncated and dropped of the real train files, against a count that shares nothing with the library."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from qtale_jax.config import load_config
from qtale_jax.data.tokens import examples
from qtale_jax.models.huggingface import from_huggingface, load_huggingface

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "stories260k_csqa.yaml"
FILES = {"ARC-Easy_train.json": 2251, "ARC-Challenge_train.json": 1119, "openbookqa_train.json": 4957}
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@pytest.fixture(scope="module")
def stories(shared_data) -> Path:
    return shared_data / "stories260k"


@pytest.fixture(scope="module")
def lengths(shared_data, stories) -> dict[str, list[tuple[int, int]]]:
    """Tokens of every row of every file: start and prompt, and start, prompt, response and end."""
    tokenizer = Tokenizer.from_file(str(stories / "tokenizer.json"))
    found = {}
    for name, count in FILES.items():
        rows = json.loads((shared_data / "csqa" / name).read_text(encoding="utf-8"))
        assert len(rows) == count and not any(row["input"] for row in rows)
        prompts = [TEMPLATE.format(row["instruction"]) for row in rows]
        texts = [prompt + row["output"] for prompt, row in zip(prompts, rows, strict=True)]
        asked = [prompt.rstrip() for prompt in prompts]  # the line break belongs to the response
        before, whole = (
            [len(each.ids) for each in tokenizer.encode_batch(part, add_special_tokens=False)]
            for part in (asked, texts)
        )
        found[name] = [(1 + prompt, 1 + both + 1) for prompt, both in zip(before, whole, strict=True)]
    return found


def split(rows: list, share: float) -> dict[str, list]:
    """The tail is held out, half for validation; as much before it is for calibration."""
    held = round(len(rows) * share)
    ends = [len(rows) - 2 * held, len(rows) - held, len(rows) - held + (held + 1) // 2, len(rows)]
    starts = [0, *ends[:-1]]
    names = ("train", "calibration", "validation", "test")
    return {name: rows[start:end] for name, start, end in zip(names, starts, ends, strict=True)}


@pytest.mark.slow
def test_the_shipped_configuration_prints_what_it_reads_and_drops(shared_data, stories, lengths, run_module, tmp_path):
    from_huggingface(stories, tmp_path / "base")
    paths = [str(shared_data / "csqa" / name) for name in FILES]
    overrides = (f"model.path={tmp_path / 'base'}", f"data.paths={json.dumps(paths)}", "output=run")
    done = run_module("qtale_jax.train", CONFIG, *overrides, "--dry-run")
    assert done.returncode == 0, done.stderr
    config = load_config(CONFIG)
    for name in ("train", "validation"):
        sizes = [whole for rows in lengths.values() for _, whole in split(rows, config.data.held_out)[name]]
        long = sum(size > config.data.length for size in sizes)
        expected = f"{name}: {len(sizes)} examples read, 0 truncated to data.length={config.data.length}, "
        said = f"{expected}{long} dropped; {len(sizes) - long} rows\n" in done.stderr
        assert said == (long > 0)  # where nothing is lost, the plan alone tells how many rows there are
        assert re.search(rf"^  rows .*\b{len(sizes) - long:,} for {name}\b", done.stdout, flags=re.MULTILINE)
        assert long > 0 or name == "validation"
    assert "  tokens " in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("length", [280, 320])
def test_cut_examples_keep_a_token_to_learn(shared_data, stories, lengths, length):
    name = "ARC-Challenge_train.json"
    config = load_config(CONFIG)
    data = {"path": str(shared_data / "csqa" / name), "paths": (), "length": length, "truncation": "right"}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    found, counts = examples(config, load_huggingface(stories).tokenizer, "train")
    sizes = split(lengths[name], config.data.held_out)["train"]
    dropped = sum(prompt >= length for prompt, whole in sizes if whole > length)
    truncated = sum(prompt < length < whole for prompt, whole in sizes)
    assert counts == (len(sizes), truncated, dropped) and truncated > 0 and dropped > 0
    assert [len(each.ids) for each in found] == [min(w, length) for p, w in sizes if w <= length or p < length]
