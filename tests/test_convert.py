"""`python -m qtale_jax.convert`, as a user runs it."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "models" / "golden" / "llama2"
MODULE = "qtale_jax.convert"


@pytest.mark.slow
def test_there_and_back(run_module, tmp_path):
    forth = run_module(MODULE, GOLDEN, "model")
    assert forth.returncode == 0, forth.stderr
    assert forth.stdout.splitlines()[-1] == "model" and "float32" in forth.stdout
    back = run_module(MODULE, "--to-hf", "model", "back")
    assert back.returncode == 0, back.stderr
    found, expected = load_file(tmp_path / "back/model.safetensors"), load_file(GOLDEN / "model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in found.items()} == {
        name: tensor.tobytes() for name, tensor in expected.items()
    }
    assert f"{sum(tensor.size for tensor in expected.values()):,}" in back.stdout
    again = run_module(MODULE, GOLDEN, "model")
    assert again.returncode == 2 and "model exists already" in again.stderr


@pytest.mark.slow
def test_the_type_can_be_chosen(run_module):
    done = run_module(MODULE, GOLDEN, "model", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "out"), "nowhere: no such directory"),
        (("--to-hf", GOLDEN, "out"), "is not a model directory"),
        ((GOLDEN, "out", "--dtype", "int4"), "invalid choice"),
        ((GOLDEN,), "required: OUT"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(run_module, tmp_path, arguments, words):
    done = run_module(MODULE, *arguments)
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
