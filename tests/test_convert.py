"""`python -m qtale_jax.convert` as users run it: tables, exit codes, one line of error."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors

from qtale_jax import convert
from qtale_jax.errors import InputError

GOLDEN = Path(__file__).parent / "models" / "golden"


def raw(directory):
    """Every tensor of a checkpoint as (type, shape, bytes)."""
    found = {}
    for file in sorted(directory.glob("model*.safetensors")):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


def rows(printed):
    """The printed table: part -> (parameters, bytes, types)."""
    found = {}
    for part, parameters, size, types in re.findall(r"│ (\w+) +│ +([\d,]+) +│ +([\d,]+) +│ +([\w, ]+?) +│", printed):
        found[part] = (int(parameters.replace(",", "")), int(size.replace(",", "")), types)
    return found


def test_there_and_back_in_one_process(tmp_path, capsys):
    convert.main([str(GOLDEN / "tied"), str(tmp_path / "model")])
    there = capsys.readouterr().out
    convert.main(["--to-hf", str(tmp_path / "model"), str(tmp_path / "back")])
    back = capsys.readouterr().out
    assert raw(tmp_path / "back") == raw(GOLDEN / "tied")
    size = sum(len(data) for _, _, data in raw(GOLDEN / "tied").values())
    assert rows(back) == {"model": (size // 2, size, "bfloat16")}
    # The 5 norms of 32 numbers are held in float32: the same numbers, twice the bytes.
    assert rows(there) == {"model": (size // 2, size + 5 * 32 * 2, "bfloat16, float32")}
    assert there.splitlines()[-1] == str(tmp_path / "model")


def test_the_type_can_be_chosen(tmp_path, capsys):
    convert.main([str(GOLDEN / "llama2"), str(tmp_path / "model"), "--dtype", "bfloat16"])
    assert rows(capsys.readouterr().out)["model"][2] == "bfloat16, float32"
    convert.main(["--to-hf", "--dtype", "float32", str(tmp_path / "model"), str(tmp_path / "back")])
    assert rows(capsys.readouterr().out)["model"][2] == "float32"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["only-one"], "the following arguments are required: OUT"),
        (["a", "b", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["a", "b", "--to-hf", "--quantized", "gptq"], "argument --quantized: invalid choice: 'gptq'"),
        (["a", "b", "--quantized", "awq"], "--quantized needs --to-hf"),
        (["a", "b", "--to-hf", "--quantized", "awq", "--dtype", "bfloat16"], "--dtype does not go with --quantized"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=f"command line: {message}"):
        convert.main(arguments)


@pytest.mark.slow
def test_the_entry_point(tmp_path, run_module):
    done = run_module("qtale_jax.convert", GOLDEN / "grouped", "model")
    assert (done.returncode, done.stderr) == (0, "")
    done = run_module("qtale_jax.convert", "--to-hf", "model", "back")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout)["model"][2] == "float16"
    assert raw(tmp_path / "back") == raw(GOLDEN / "grouped")
    done = run_module("qtale_jax.convert", "--help")
    assert done.returncode == 0
    assert "--to-hf" in done.stdout


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, run_here):
    broken = Path(shutil.copytree(GOLDEN / "llama2", tmp_path / "broken"))
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-100])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, message in (
        (("nowhere", "out"), "nowhere: no such directory"),
        ((broken, "out"), "model.safetensors is truncated"),
        ((GOLDEN / "llama2", "taken"), "taken exists already"),
        (("--to-hf", GOLDEN / "llama2", "out"), "is not a model directory: model.json is missing"),
        ((GOLDEN / "llama2", "out", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    ):
        done = run_here("qtale_jax.convert", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert re.fullmatch(r"error: .*\n", done.stderr)
        assert message in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_stories260k(tmp_path, run_module, shared_data):
    source = shared_data / "stories260k"
    if not source.is_dir():
        pytest.skip(f"no checkpoint in {source}")
    assert run_module("qtale_jax.convert", source, "model").returncode == 0
    done = run_module("qtale_jax.convert", "--to-hf", "model", "back")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout)["model"] == (260_032, 1_040_128, "float32")
    assert raw(tmp_path / "back") == raw(source)
    assert (tmp_path / "back" / "tokenizer.json").is_file()
