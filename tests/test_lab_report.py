"""The laboratory's report: its files, and its page in a real browser."""

import csv
import dataclasses
import re

import pytest

from nbgrad.cli import main
from nbgrad.lab import results, studies
from nbgrad.viz import outcomes as reading, page, report
from nbgrad.viz.outcomes import USUAL
from nbgrad.viz.palette import STYLES

from . import lab_findings as findings
from .lab_browser import CONTENT, PHONE, browser, visit
from .lab_findings import HOSTILE

__all__ = ["browser", "visit"]          # fixtures


@pytest.fixture(scope="module")
def made():
    return findings.outcomes()


@pytest.fixture(scope="module", autouse=True)
def listed(made):
    real = [results.texts(studies.find(name)) for name in studies.names()]
    with pytest.MonkeyPatch.context() as patch:
        findings.listed(patch, len(made))
        yield real


@pytest.fixture(scope="module")
def written(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("lab")
    return report.write(findings.write(folder, made))[0]


# ------------------------------------------------------------------------------------------- files

def test_a_report_is_a_page_markdown_and_csv_files(written, made):
    there = {str(p.relative_to(written.parent)) for p in written.parent.rglob("*") if p.is_file()}
    done = [o for o in made if o.finding is not None]
    assert {"report.html", "report.md", "verdicts.csv"} <= there
    assert {f"tables/{o.name}.csv" for o in done} <= there
    figures = sum(len(o.finding.figures) for o in done)
    assert sum("-figure-" in name for name in there) == figures
    text = (written.parent / "tables" / f"{done[0].name}.csv").read_text()
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == list(findings.table().columns)
    assert rows[2] == ["batch norm", "1e-05", "0.934 [0.918, 0.947]", "1250", "0/5"]
    assert rows[3][3] == ""
    assert "<dt>Changed</dt><dd>Seeds were raised after a first run.</dd>" in written.read_text()
    text = (written.parent / "verdicts.csv").read_text()
    verdicts = list(csv.DictReader(text.splitlines()))
    assert [row["verdict"] for row in verdicts[:3]] == ["not supported", "depends", "supported"]


def test_out_may_be_a_file_or_another_folder(tmp_path, written):
    file = tmp_path / "deep" / "page.HTML"
    assert report.write(written.parent, file) == [file]
    assert file.read_text() == written.read_text()
    paths = report.write(written.parent, tmp_path / "site")
    assert paths[0] == tmp_path / "site" / "report.html"
    assert all(p.exists() for p in paths)


def test_studies_without_a_result_are_listed_as_such(tmp_path, made):
    report.write(findings.write(tmp_path, made[:3]))
    text = (tmp_path / "report.html").read_text()
    assert text.count('<section class="study"') == len(made) + 1
    assert text.count("This study has not run.") == len(made) - 2
    assert "3 of 21 studies" in text
    assert len((tmp_path / "verdicts.csv").read_text().splitlines()) == 1 + 3


def test_a_run_that_was_killed_before_it_could_say_so_is_interrupted(tmp_path):
    (tmp_path / "study-21").mkdir()
    (tmp_path / "study-21" / "cells.jsonl").write_text("")
    one = reading.read(tmp_path)[-1]
    assert (one.name, reading.state(one)) == ("study-21", "interrupted")
    assert reading.conditions(one).endswith("The same command goes on from there.")


def test_states_are_said_in_words(made):
    said = {reading.state(o): reading.conditions(o) for o in made[-2:]}
    assert said == {
        "failed": "2 of 30 cells failed: FloatingPointError: loss is <nan>.",
        "interrupted": "Interrupted: 12 of 30 cells are done. The same command goes on from there."}
    assert reading.again(made[0]) == f"nbgrad lab run {made[0].name}"


def test_it_names_the_data(made):
    others = [dataclasses.replace(o, data=data) for o, data in
              zip(made, ("fashion_mnist", "fashion_mnist", ""))]
    assert "3 studies, quick settings on Fashion-MNIST, " in reading.heading(others)
    assert [reading.machine(o)[1] for o in others] == ["Fashion-MNIST", "Fashion-MNIST", "no data"]
    assert "quick settings on UCI digits and CIFAR-10, " in reading.heading(
        [made[0], dataclasses.replace(made[1], data="cifar10")])


def test_it_names_the_days_and_machines_of_a_run_that_was_resumed(made):
    there = {"nbgrad": "0.1.0", "cpu": "znver4", "cores": 2}
    parts = [results.Part(20, "2026-11-18", there),
             results.Part(10, "2026-11-20", {**there, "cpu": "haswell", "cores": 1})]
    one = dataclasses.replace(made[0], parts=parts)
    assert reading.machine(one)[-2:] == [
        "20 of the cells on 2026-11-18 on znver4, 2 cores, nbgrad 0.1.0",
        "10 of the cells on 2026-11-20 on haswell, 1 core, nbgrad 0.1.0"]
    assert reading.heading([one, made[1]]).endswith(
        "znver4 with 2 cores; haswell with 1 core; 2026-11-18 to 2026-11-20.")
    assert "10 of the cells on 2026-11-20 on haswell" in page.html([one])
    unknown = dataclasses.replace(one, parts=[results.Part(30, "", {})])
    assert reading.machine(unknown)[-1] == (
        "30 of the cells at a time and place that their file does not say")
    whole = dataclasses.replace(one, parts=parts[:1])
    assert reading.machine(whole)[-2:] == ["nbgrad 0.1.0", "2026-11-18"]


def test_what_is_no_folder_of_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; `nbgrad lab run` makes one"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no results"):
        report.write(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "finding.json").write_text("{}")
    with pytest.raises(ValueError, match=r"finding\.json: no finding of this version"):
        report.write(tmp_path)


def test_the_command_writes_it_and_says_where(tmp_path, made, capsys):
    findings.write(tmp_path / "lab", made[:2])
    assert main(["lab", "report", str(tmp_path / "lab")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(str(tmp_path / "lab" / name) for name in
                       ("report.html", "report.md", "verdicts.csv")),
                     f"{tmp_path / 'lab' / 'tables'} (6 tables)"]
    assert main(["lab", "report", str(tmp_path / "lab"), "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a.html")]
    assert main(["lab", "report", "--out", str(tmp_path / "lab")]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["lab", "report", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["lab", "report", str(tmp_path / "lab"), "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_the_page_shows_no_path_of_the_machine_and_loads_nothing(written):
    text = written.read_text()
    assert "/home/someone" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_markdown_shows_hostile_texts_as_they_are(written):
    text = (written.parent / "report.md").read_text()
    outside = re.sub(r"(`+).*?(?<!`)\1(?!`)", "", text)      # of code
    assert "<script>" not in outside
    assert "<img" not in outside
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) == 21
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


# ----------------------------------------------------------------------------------------- browser

@pytest.mark.parametrize("script", [True, False])
def test_every_plot_has_content_with_and_without_its_script(visit, made, script):
    tab = visit(java_script_enabled=script)
    plots = tab.locator("svg.plot")
    figures = [f for o in made if o.finding for f in o.finding.figures]
    assert plots.count() == len(figures)
    for marks, figure in zip(plots.evaluate_all(CONTENT), figures):
        if figure.title == findings.nothing().title:
            assert marks == 0
        else:
            assert marks >= len(figure.series)
    box = plots.first.bounding_box()
    assert box["width"] > 300
    assert box["height"] > 150


def test_hostile_texts_are_text(visit):
    tab = visit()
    assert tab.locator("img").count() == 0
    assert tab.locator("script").count() == 1
    section = tab.locator("section", has_text="alert(")
    assert section.locator("h2").inner_text() == f"{HOSTILE} question"
    assert section.locator("figcaption").inner_text() == HOSTILE


def column(tab, i):
    return tab.locator(f".claims tbody td:nth-child({i})").all_inner_texts()


def test_the_table_sorts_by_mouse_and_keyboard(visit):
    tab = visit()
    heads = tab.locator(".claims th")
    assert column(tab, 1) == [str(i) for i in range(1, 22)]
    heads.nth(2).locator("button").click()
    order = ["supported", "depends", "not supported", "failed", "interrupted", "not run"]
    shown = [v.strip() for v in column(tab, 3)]
    assert shown == sorted(shown, key=order.index)
    assert set(shown) == set(order)
    assert [h.get_attribute("aria-sort") for h in heads.all()] == ["none", "none", "ascending",
                                                                   "none"]
    tab.keyboard.press("Enter")
    assert [v.strip() for v in column(tab, 3)] == sorted(shown, key=order.index, reverse=True)
    assert heads.nth(2).get_attribute("aria-sort") == "descending"
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Space")
    claims = column(tab, 2)
    numbers = [int(n) for text in claims for n in re.findall(r"claim (\d+)", text)]
    assert numbers == sorted(numbers)                   # 2 before 10
    heads.nth(0).locator("button").click()
    heads.nth(0).locator("button").click()
    assert column(tab, 1) == [str(i) for i in range(21, 0, -1)]


def test_the_keyboard_reaches_everything(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    focus = "document.activeElement"
    assert tab.evaluate(f"{focus}.className") == "skip"
    assert tab.evaluate(f"{focus}.getBoundingClientRect().left") >= 0
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#claims"
    tab.keyboard.press("Tab")
    assert tab.evaluate(f"{focus}.tagName") == "BUTTON"
    assert tab.evaluate(f"getComputedStyle({focus}).outlineStyle") == "solid"
    reached = set()
    for _ in range(80):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate(f"{focus}.closest('section')?.id ?? ''"))
    assert len(reached) > 5
    targets = tab.locator("a").evaluate_all("all => all.map(a => a.hash.slice(1))")
    assert tab.evaluate("ids => ids.every(id => document.getElementById(id))", targets)
    ids = tab.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_never_scrolls_sideways(visit, width):
    tab = visit(viewport={"width": width, "height": 800})
    tab.locator("details").evaluate_all("all => all.forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_the_verdicts_are_on_the_first_screen(visit, tmp_path, listed):
    """With the claims and sources of the studies that there are. Of 1280 × 900: in Liberation Sans
    they take 795; other fonts are wider."""
    plain = [findings.outcome(f"study-{i + 1}", findings.VERDICTS[i % 3], (),
                              study={**own, "name": f"study-{i + 1}"})
             for i, own in enumerate(listed)]
    file = tmp_path / "page.html"
    file.write_text(page.html(plain))
    desk, phone = visit(file), visit(file, viewport=PHONE)
    bottom = "e => e.getBoundingClientRect().bottom"
    assert desk.locator(".claims").evaluate(bottom) <= 900
    assert phone.locator(".usual").evaluate(bottom) <= PHONE["height"] / 2
    words = [text.split("\n") for text in phone.locator(".usual li").all_inner_texts()]
    assert [word[0] for word in words] == list(USUAL)
    assert [word[1] for word in words] == ["supported", "not supported", "depends"] + [
        "supported", "not supported"]


def channels(color):
    return [int(n) for n in re.findall(r"\d+", color)[:3]]


def luminance(color):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
              for c in (n / 255 for n in channels(color))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_scheme_has_its_colours_and_its_words_can_be_read(visit, scheme):
    """4.5 : 1, as WCAG 2.2 wants of text."""
    tab = visit(color_scheme=scheme)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.02) == (scheme == "dark")
    for what in ("body", ".soft", ".supported", ".not-supported", ".depends", ".without",
                 ".facts dt", ".plot text", ".again code", "th button", ".legend", ".again a"):
        color = tab.locator(what).first.evaluate(
            "e => e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color")
        low, high = sorted((luminance(color), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, what
    line = tab.locator("svg.plot .s1 .line").first.evaluate("e => getComputedStyle(e).stroke")
    wanted = getattr(STYLES[0], scheme)
    assert channels(line) == [int(wanted[i:i + 2], 16) for i in (1, 3, 5)]


def test_it_prints_dark_on_light_with_a_study_on_each_page(visit):
    tab = visit(color_scheme="dark")
    tab.emulate_media(media="print")
    assert luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
    assert luminance(tab.evaluate("getComputedStyle(document.body).color")) < 0.05
    assert not tab.locator("details").first.is_visible()
    pages = re.findall(rb"/Type\s*/Page\b", tab.pdf(format="A4"))
    assert len(pages) >= 22
