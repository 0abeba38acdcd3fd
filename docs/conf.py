"""Sphinx: Markdown pages (MyST), the configuration page generated from the types before every build."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from qtale_jax import __version__  # noqa: E402
from qtale_jax.config.reference import markdown  # noqa: E402

project = "QTALE-JAX"
release = version = __version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nitpicky = True
smartquotes = False

html_theme = "furo"
html_title = project
html_show_sphinx = False
html_copy_source = False


def generate(_app: object) -> None:
    """Writes reference/configuration.md."""
    page = HERE / "reference" / "configuration.md"
    text = markdown()
    if not page.exists() or page.read_text(encoding="utf-8") != text:  # an untouched page is not built again
        page.write_text(text, encoding="utf-8")


def setup(app) -> None:
    """Generates pages when a build starts."""
    app.connect("builder-inited", generate)
