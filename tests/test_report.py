"""The report of a study, in a real browser."""

import re
import shutil

import pytest
from stored_study import stored_study

from pyhealth.bilevel.plot_style import new_figure, write_png
from pyhealth.bilevel.study.jobs import Job
from pyhealth.bilevel.study.report import write_report

pytestmark = pytest.mark.slow  # a whole study, and a browser


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two cohort sizes, one run of which has drawn its policy."""
    folder = stored_study(tmp_path_factory.mktemp("study"))
    shutil.copytree(folder / "MI/n500", folder / "MI/n1000")
    drawn = folder / Job("MI", 500, 0, "D").name
    for name in ("policy.png", "learning_curves.png", "ecg_augmented.png"):
        write_png(new_figure(3, 2), drawn / name)
    (folder / "study.json").write_text('{"command": "python study.py <b>"}')
    return folder


@pytest.fixture(scope="module")
def page(study):
    return write_report(study).read_text()


def test_the_report_needs_nothing_else(page):
    assert "http" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert page.count("<h2>") == 5  # two cohorts, sizes, how to read, how to repeat
    assert "python study.py &lt;b&gt;" in page


def test_the_report_says_the_verdicts(page):
    for words in (
        "D helps",
        "A as long as D",
        "S hurts",
        "E no difference shown at 5 seeds",
    ):
        assert re.sub(r"\s+", " ", page).count(words) == 2


def test_every_picture_says_what_it_shows(page):
    alts = re.findall(r"<img src=\"data:image/png[^>]*alt=\"([^\"]*)\"", page)
    assert len(alts) == page.count("<img ") == 2 * 2 + 3 + 1
    assert all(len(alt) > 30 for alt in alts)


def test_it_is_made_from_what_is_stored_alone(study, page, monkeypatch):
    for name in (
        "pyhealth.bilevel.study.run.train",
        "pyhealth.bilevel.study.run.search",
        "pyhealth.datasets.ecg_dataset.ECGDataset.set_task",
        "pyhealth.processors.ecg_record_processor.read_digital",
    ):
        monkeypatch.setattr(name, lambda *args: pytest.fail("not from the stored"))
    assert write_report(study).read_text() == page


@pytest.mark.parametrize("width", [390, 1280])
def test_it_works_in_a_browser(study, page, browser, width):
    said = []
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto((study / "report.html").as_uri())
    assert said == []
    # Nothing is wider than the window but the table, which scrolls by itself.
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    widths = tab.evaluate("[...document.images].map(i => [i.naturalWidth, i.complete])")
    assert len(widths) == 8 and all(size > 100 and done for size, done in widths)

    table = tab.locator("table").first
    letters = lambda: table.locator("tbody th").all_inner_texts()  # noqa: E731
    assert letters() == ["A", "A", "A+", "D", "E", "S"]
    heading = table.get_by_role("button", name="AUROC", exact=True)
    heading.focus()
    tab.keyboard.press("Enter")  # without a mouse
    assert letters()[-1] == "D"
    assert table.locator("th[aria-sort=ascending]").inner_text().startswith("AUROC")
    heading.click()
    assert letters()[0] == "D"
    table.get_by_role("button", name="leak AUROC").click()
    assert letters()[:2] == ["D", "S"]  # the others have none
    assert said == []
    tab.close()
