"""The documentation: it builds without a warning, and its code runs."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SCRIPT = "examples/ptbxl_ecg_classification_taskaug_resnet.py"
PAGES = {page.name: page for page in sorted(DOCS.glob("*.md"))}
#: Languages of blocks that are no code to run: output, data.
NOT_RUN = {"text", "{toctree}", "{include}", "{literalinclude}"}
#: Commands of other tools, in the shell blocks of the pages that explain them.
OTHER_COMMANDS = (
    "make",
    "pip",
    "python benchmarks",
    "python examples",
    "cd",
    "git",
    "torchrun",
    "sbatch",
)


def blocks(page):
    """Return (language, code) of every fenced block of a page."""
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(r"^```(\S*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def parse_arguments():
    spec = importlib.util.spec_from_file_location("command_line", ROOT / SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.parse_arguments


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_language_that_is_tested(page):
    assert {language for language, _ in blocks(page)} <= {"python", "sh", *NOT_RUN}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "python" in dict(blocks(page))]
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if "sh" in dict(blocks(page))])
def test_the_commands_of_a_page_are_those_that_there_are(page, parse_arguments):
    for language, code in blocks(page):
        if language != "sh":
            continue
        for line in code.replace("\\\n", " ").splitlines():
            line = line.partition("#")[0].strip()
            if line.startswith(f"python {SCRIPT}"):
                parse_arguments(shlex.split(line)[2:])  # it exits on a wrong one
            elif line:
                assert line.startswith(OTHER_COMMANDS)
                target = re.fullmatch(r"make ([\w-]+).*", line)
                if target:
                    makefile = (ROOT / "Makefile").read_text()
                    assert re.search(rf"^{target[1]}:", makefile, flags=re.MULTILINE)


def test_the_figure_of_the_logits_shows_what_is_said_of_it(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from straight_through import logit_gradients

    _, exact, ours, drawn_only = logit_gradients()
    assert torch.cosine_similarity(exact, ours, dim=0, eps=1e-20) > 0.99
    assert drawn_only.norm() < 1e-3 * exact.norm()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, in which a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*command, "-d", folder / "trees", DOCS, folder / "html"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "html"


@pytest.mark.slow
def test_the_site_has_every_page_and_its_pictures(site):
    assert {path.stem for path in site.glob("*.html")} >= {Path(p).stem for p in PAGES}
    cards = {path.stem for path in (site / "_generated/policies").glob("*.html")}
    assert cards == {path.stem for path in (ROOT / "policies").glob("*.md")}
    page = (site / "_generated" / "operations.html").read_text()
    assert "lead_dropout" in page
    for picture in re.findall(r'src="([^"]+\.png)"', page):
        assert (site / "_generated" / picture).resolve().is_file()


#: Texts whose contrast is below WCAG 2.2's AA: 4.5, or 3 where they are large. Against
#: the first opaque background; that a text itself lets it through is not looked at.
LOW_CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const style = getComputedStyle(element);
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const [a, b] = [light(parse(style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5))
      found.push([walker.currentNode.data.trim(), ratio, style.color]);
  }
  return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_can_be_read(site, browser, width, scheme):
    tab = browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("requestfailed", lambda request: said.append(request.url))
    pages = [*site.glob("*.html"), *site.glob("_generated/**/*.html")]
    assert len(pages) > len(PAGES)
    for page in pages:
        tab.goto(page.as_uri())
        assert said == [], page
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, page
        for picture in tab.locator("img[src*=_images]").all():
            assert len(picture.get_attribute("alt")) > 10, page
        assert tab.evaluate(LOW_CONTRAST) == [], page
    tab.close()


@pytest.mark.slow
def test_a_page_needs_no_mouse(site, browser):
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto((site / "get_started.html").as_uri())
    focused = "document.activeElement"
    tab.keyboard.press("Tab")
    assert tab.evaluate(f"{focused}.textContent.trim()") == "Skip to content"
    tab.keyboard.press("Enter")
    assert tab.url.endswith("#furo-main-content")
    places = set()
    for _ in range(10):
        tab.keyboard.press("Tab")
        outline = tab.evaluate(f"getComputedStyle({focused}).outlineStyle")
        assert outline != "none", tab.evaluate(f"{focused}.className")
        places.add(tab.evaluate(f"JSON.stringify({focused}.getBoundingClientRect())"))
    assert len(places) == 10
    tab.close()
