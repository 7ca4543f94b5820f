"""The settings of the documentation's build: ``make docs``."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

# litdata otherwise asks the package index for a newer version of itself at import.
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

project = "pyhealth-taskaug"
author = "pyhealth-taskaug contributors"
release = version = installed_version("pyhealth-taskaug")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "pyhealth-taskaug"
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = ["Cite", "Convention"]
napoleon_use_ivar = True
# The tables that benchmarks print bring their headings with them.
suppress_warnings = ["myst.xref_missing", "myst.header"]


def draw_figures(app: Sphinx) -> None:
    """Make the pictures and the gallery's page before the sources are read."""
    from figures import draw_all

    draw_all(DOCS / "_generated")


def setup(app: Sphinx) -> None:
    """Hook the pictures into the build."""
    app.connect("builder-inited", draw_figures)
