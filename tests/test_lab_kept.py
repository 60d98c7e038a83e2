"""What is committed of the laboratory: findings of the studies as they are now, and a page, a
docs/lab.md and a README that say what these files say.

Where these fail because a study changed: ``nbgrad lab run --all --out DIR`` on a quiet machine,
then ``python -m bench.lab_page DIR``.
"""

import pytest

from bench import lab_page, report
from nbgrad.lab import judging, results, running, studies
from nbgrad.viz import page
from nbgrad.viz.outcomes import USUAL

from .lab_browser import CONTENT, PHONE, browser, visit

__all__ = ["browser", "visit"]          # fixtures


@pytest.fixture(scope="module")
def kept():
    return {o.name: o for o in lab_page.load()}


@pytest.fixture(scope="module")
def written(tmp_path_factory, kept):
    file = tmp_path_factory.mktemp("kept") / "report.html"
    file.write_text(page.html(list(kept.values())), encoding="utf-8")
    return file


def test_every_study_has_a_finding(kept):
    assert tuple(kept) == studies.names()


@pytest.mark.parametrize("name", studies.names())
def test_a_finding_is_of_the_study_as_it_is(kept, name):
    """Its texts, its cells and its seeds; so a page cannot say what the study no longer does."""
    study, one = studies.find(name), kept[name]
    assert one.study == results.texts(study)
    cells = running.cells_of(study, running.Plan())
    assert (one.cells, one.done, one.scale, one.state) == (len(cells), len(cells), "quick",
                                                           "complete")
    assert one.seeds == max(len({cell["seed"] for cell in cells if "seed" in cell}), 1)
    assert set(judging.many(study.comparisons)) <= set(one.finding.notes)
    assert one.errors == []


def test_what_is_written_from_them_is_what_they_say(kept):
    """docs/lab.md and the README's block, without their pictures, which are drawn again."""
    outcomes = list(kept.values())
    files = {o.name: [f"lab/{o.name}-{i + 1}.png" for i in range(len(o.finding.figures))]
             for o in outcomes}
    assert lab_page.PAGE.read_text(encoding="utf-8") == lab_page.markdown_page(outcomes, files)
    readme = report.README.read_text(encoding="utf-8")
    assert lab_page.write(readme, outcomes) == readme
    there = {path.name for path in lab_page.PAGE.with_suffix("").iterdir()}
    assert there == {file.removeprefix("lab/") for own in files.values() for file in own}


# ----------------------------------------------------------------------------------------- browser

@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_of_them_never_scrolls_sideways(visit, width):
    tab = visit(viewport={"width": width, "height": 800})
    tab.locator("details").evaluate_all("all => all.forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_every_plot_of_them_has_content(visit, kept):
    """A mark at least for each series that has a value."""
    figures = [f for o in kept.values() for f in o.finding.figures]
    marks = visit().locator("svg.plot").evaluate_all(CONTENT)
    assert len(marks) == len(figures)
    for n, figure in zip(marks, figures):
        drawn = sum(any(y is not None for y in series.y) for series in figure.series)
        assert n >= drawn >= 1, figure.title


def test_the_usual_claims_stand_on_top_with_their_verdicts(visit, kept):
    tab = visit(viewport=PHONE)
    words = [text.split("\n") for text in tab.locator(".usual li").all_inner_texts()]
    assert [word[0] for word in words] == list(USUAL)
    names = [studies.names()[number - 1] for number in USUAL.values()]
    assert [word[1] for word in words] == [kept[name].verdict for name in names]
    assert tab.locator(".usual").evaluate("e => e.getBoundingClientRect().bottom") <= 422
