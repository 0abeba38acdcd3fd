"""Calibration rows come from their own split, are as many as asked for, and are recorded."""

import hashlib
import json

import numpy as np
import pytest

from qtale_jax.config.schema import Config
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.quantization.calibration_rows import calibration_rows


@pytest.fixture(scope="module")
def spec(make_routed):
    return make_routed(num_layers=2)[0]


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Sixty questions of 7 or 8 tokens; the last 12 but 6 are held out, the 12 before these for calibration."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"query": f"sum : {i % 15} {i // 15} =", "choices": ["1", "2"], "gold": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(path, examples: int = 10, method: str = "gptq", **data) -> Config:
    data = {"kind": "multiple_choice", "path": str(path), "length": 24, "held_out": 0.2} | data
    return Config.model_validate(
        {"data": data, "quantize": {"method": method, "statistics": {"examples": examples}}, "seed": 3}
    )


def texts(rows, tokenizer) -> list[str]:
    """The examples, in the order of the rows."""
    return [
        tokenizer.decode(tokens[segments == segment], skip_special_tokens=True)
        for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True)
        for segment in range(1, segments.max() + 1)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_the_first_examples_of_the_calibration_split(spec, sums, packing):
    tokenizer = reasoning.tokenizer()
    rows = calibration_rows(config_for(sums, packing=packing), spec, tokenizer)
    # Of 60 rows the last 12 are held out, and the 12 before them are for calibration: 36 to 47.
    questions = [f"sum : {i % 15} {i // 15} = {i % 2 + 1}" for i in range(36, 46)]
    assert sorted(texts(rows, tokenizer)) == sorted(questions)
    assert packing or texts(rows, tokenizer) == questions
    assert rows.examples == 10 and rows.tokens.dtype == rows.segment_ids.dtype == np.int32
    assert rows.tokens.shape == rows.segment_ids.shape
    assert (len(rows.tokens) < 10) == packing
    assert rows.segment_ids.any(axis=0).all() and rows.tokens.shape[1] <= 24  # no column of padding alone


def test_what_is_recorded(spec, sums):
    config = config_for(sums)
    rows = calibration_rows(config, spec, reasoning.tokenizer())
    noted = rows.describe(config)
    digest = hashlib.sha256(rows.tokens.astype("<i4").tobytes() + rows.segment_ids.astype("<i4").tobytes()).hexdigest()
    assert noted == {
        "data": {"kind": "multiple_choice", "path": str(sums), "split": "calibration"},
        "seed": 3,
        "examples": 10,
        "rows": list(rows.tokens.shape),
        "tokens": int((rows.segment_ids > 0).sum()),
        "sha256": digest,
    }
    assert json.loads(json.dumps(noted)) == noted
    again = calibration_rows(config, spec, reasoning.tokenizer()).describe(config)
    fewer = config_for(sums, examples=9)
    assert again == noted
    assert calibration_rows(fewer, spec, reasoning.tokenizer()).describe(fewer)["sha256"] != digest


def refused(config, spec, tokenizer, *messages: str) -> None:
    with pytest.raises(InputError) as error:
        calibration_rows(config, spec, tokenizer)
    assert all(message in str(error.value) for message in messages) and "\n" not in str(error.value)


def test_refuses_what_cannot_be_read(spec, sums, tmp_path):
    tokenizer = reasoning.tokenizer()
    refused(config_for(sums), spec, None, "quantize.method='gptq'", "no tokenizer", "allowed: quantize.method=rtn")
    short = "quantize.statistics.examples=13, but the calibration split has only 12 examples"
    refused(config_for(sums, examples=13), spec, tokenizer, short, "data.length=24")
    (tmp_path / "empty.jsonl").write_text("")
    refused(config_for(tmp_path / "empty.jsonl"), spec, tokenizer, "empty.jsonl is empty")
    refused(config_for(tmp_path / "gone.jsonl"), spec, tokenizer, "gone.jsonl: no such file")
    narrow = spec.model_copy(update={"architecture": spec.architecture.model_copy(update={"max_length": 6})})
    refused(config_for(sums), narrow, tokenizer, "data.length=24: calibration rows of", "context of 6")
    assert [file.name for file in tmp_path.iterdir()] == ["empty.jsonl"]
