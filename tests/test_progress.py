"""Where standard error is not a terminal, progress is whole lines: no bars, no control characters."""

import io
import re

import pytest
import yaml
from rich.console import Console

from qtale_jax.command import STAGES, parse
from qtale_jax.data import reasoning
from qtale_jax.evaluate import run_stage as evaluate
from qtale_jax.quantization.report import LayerReport
from qtale_jax.quantize import run_stage as quantize
from qtale_jax.reporting.console import layer_progress
from qtale_jax.train import main as train


@pytest.fixture
def config_file(tmp_path):
    words = list(reasoning.WORDS)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(" ".join(words[i : i + 6]) for i in range(30)))
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2}
    config = {
        "output": str(tmp_path / "run"),
        "model": {"architecture": shape},
        "routing": {"method": "dense"},
        "lora": None,
        "data": {"kind": "text", "path": str(tmp_path / "text.txt"), "length": 16},
        "train": {"steps": 4, "batch_size": 8, "parameters": "all", "log_every": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


@pytest.mark.slow
def test_stages_print_whole_lines(config_file, capsys):
    train([config_file])
    config = parse("quantize", STAGES["quantize"], [config_file])
    quantize(config)
    evaluate(config)
    printed = capsys.readouterr()
    assert not re.search(r"[\x1b\r\x08]", printed.out + printed.err)
    lines = printed.err.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 2/4", "step 4/4"]
    assert [line.split(":")[0] for line in lines if line.startswith("layer")] == ["layer 1/2", "layer 2/2"]
    assert "evaluating rows" not in printed.err


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_a_bar(terminal):
    stream = io.StringIO()
    with layer_progress(Console(file=stream, force_terminal=terminal), 1, quiet=False) as say:
        say(LayerReport(0, {}, 0, 0), False)
    assert ("\x1b" in stream.getvalue()) == terminal
    assert ("layer 1/1" in stream.getvalue()) != terminal
