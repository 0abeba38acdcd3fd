"""The notebooks: small, stripped, on one parameter; and what executes them says when a cell fails.

`launch/notebooks.sh` executes them.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def test_they_are_there_and_readme_names_them():
    assert len(NOTEBOOKS) == 4
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_nothing_of_a_machine_is_left(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert set(content["metadata"]) <= {"kernelspec", "language_info"}
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
    assert path.stat().st_size < 15_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_prose_comes_first_and_code_is_short(path):
    content = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert content[0]["cell_type"] == "markdown" and text(content[0]).startswith("# ")
    prose, code = cells(path, "markdown"), cells(path, "code")
    assert len(prose) >= len(code)
    for cell in code:
        ast.parse(text(cell))
        assert len(cell["source"]) <= 40
    for cell in prose:
        for target in re.findall(r"\]\(([^)#\s]+)\)", text(cell)):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_where_the_experiment_is_stands_in_one_cell(path):
    naming = [cell for cell in cells(path, "code") if "runs/" in text(cell)]
    if path.stem == "compress":  # needs no experiment
        assert not naming
    else:
        (cell,) = naming
        assert 'RUN = Path(os.environ.get("QTALE_RUN", "../runs/quickstart"))' in text(cell)


def notebook(path: Path, *sources: str) -> Path:
    made = [
        {"cell_type": "code", "execution_count": None, "id": str(i), "metadata": {}, "outputs": [], "source": source}
        for i, source in enumerate(sources)
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.slow
def test_a_failing_cell_and_a_warning_fail_and_copies_are_kept(tmp_path):
    pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
    pytest.importorskip("ipykernel", reason="the extra 'notebooks' is not installed")
    good = notebook(tmp_path / "good.ipynb", "from pathlib import Path\nprint(Path.cwd())")
    paths = [
        notebook(tmp_path / "bad.ipynb", "x = 1", "x / 0", "print('never')"),
        notebook(tmp_path / "loud.ipynb", "import warnings\nwarnings.warn('careful')"),
        good,
    ]
    command = [sys.executable, str(ROOT / "launch" / "execute_notebooks.py"), str(tmp_path / "executed")]
    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "careful" in done.stderr
    assert re.search(r"^good.ipynb: \d+ s$", done.stderr, flags=re.MULTILINE)
    assert re.search(r"^bad.ipynb: \d+ s, FAILED$", done.stderr, flags=re.MULTILINE)
    (cell,) = cells(tmp_path / "executed" / "good.ipynb", "code")
    assert text({"source": cell["outputs"][0]["text"]}).strip() == str(tmp_path)
    assert cells(good, "code")[0]["outputs"] == []
