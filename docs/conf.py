"""The settings of the documentation's build: ``make docs``."""

from __future__ import annotations

import os
import shutil
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
copyright = f"2026, {author}"
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
html_css_files = ["site.css"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = ["Cite", "Convention"]
napoleon_use_ivar = True
# The tables that benchmarks print bring their headings with them.
suppress_warnings = ["myst.header"]


def make_pages(app: Sphinx) -> None:
    """Make the pictures, the gallery and the policies' cards into sources."""
    from figures import draw_all

    draw_all(DOCS / "_generated")
    cards = DOCS / "_generated" / "policies"
    shutil.rmtree(cards, ignore_errors=True)
    cards.mkdir()
    for card in sorted((DOCS.parent / "policies").glob("*.md")):
        text = card.read_text(encoding="utf-8").replace("](../docs/", "](../../")
        (cards / card.name).write_text(text, encoding="utf-8")


def link_cards(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead to the cards' copies, since the cards lie outside of the site's sources."""
    source[0] = source[0].replace("](../policies/", "](_generated/policies/")


def setup(app: Sphinx) -> None:
    """Hook the generated pages into the build."""
    app.connect("builder-inited", make_pages)
    app.connect("source-read", link_cards)
