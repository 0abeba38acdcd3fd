"""The documentation: commands that parse, links that lead somewhere, a guide per stage; built where Sphinx is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qtale_jax.command import STAGES
from qtale_jax.config import load_config
from qtale_jax.config.catalogue import find

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "configuration.md"]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command) for every stage that a page runs."""
    found = []
    for page in WRITTEN:
        for block in blocks(page, "sh"):
            lines = [line.split("   #")[0] for line in block.splitlines() if line.startswith("python -m qtale_jax")]
            settings = dict(re.findall(r'^(\w+)="(.*)"$', block, flags=re.MULTILINE))
            for line in lines:
                for name, value in settings.items():
                    line = line.replace(f"${name}", value)
                found.append((str(page.relative_to(ROOT)), line))
    return found


def test_there_is_a_guide_for_every_stage():
    assert len(WRITTEN) > 15 and len(commands()) > 15
    for stage in STAGES:
        text = (ROOT / "docs" / "guide" / f"{stage}.md").read_text(encoding="utf-8")
        assert f"python -m qtale_jax.{stage} " in text


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_name_stages_files_and_keys(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    module, *arguments = shlex.split(command)[2:]
    stage = module.removeprefix("qtale_jax").removeprefix(".")
    if not stage:
        return
    assert stage in STAGES
    if stage == "convert":
        return
    config, *overrides = [argument for argument in arguments if not argument.startswith("--")]
    load_config(config, overrides)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_links_and_keys_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            generated = target.endswith("reference/configuration.md")
            assert generated or (page.parent / target).exists(), target
    sections = ("model", "routing", "lora", "data", "train", "mesh", "quantize")
    sections += ("calibrate", "budget", "evaluate", "harness", "generate", "serve", "distributed", "plan", "profile")
    for key in re.findall(rf"`((?:{'|'.join(sections)})(?:\.[a-z_]+)+)[:=`]", text):
        assert key.endswith(".json") or find(key.split(".")) is not None, key


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_files_that_pages_name_are_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:qtale_jax|configs|launch|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:models|quantization|training|config|data|inference)/[\w./-]+\.py)`", text):
        assert name.endswith("/NAME.py") or (ROOT / "qtale_jax" / name).exists(), name


@pytest.mark.slow
def test_it_builds_without_warnings(tmp_path):
    pytest.importorskip("furo", reason="the extra 'docs' is not installed")
    pytest.importorskip("myst_parser", reason="the extra 'docs' is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "out" / "reference" / "configuration.html").read_text(encoding="utf-8")
    assert "routing.entropy_weight" in page
