"""``bench.lab_page``: what the README and docs/lab.md say is what the results' files say."""

import json
import re

import pytest

from bench import lab_page
from nbgrad.lab import results

from . import lab_findings as findings
from .lab_findings import HOSTILE

pytest.importorskip("matplotlib")
README = "Before.\n\n<!-- table: lab -->\nold\n<!-- end: lab -->\n\nAfter \\1.\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Results on disk, as three studies leave them, and one that was interrupted."""
    folder = tmp_path_factory.mktemp("lab")
    evil = {key: f"{HOSTILE} {key}" for key in findings.texts("study-9")} | {"name": "study-9"}
    return findings.write(folder, [
        findings.outcome("study-5", "not supported", [findings.bars()], 1),
        findings.outcome("study-7", "depends", (), 2),
        findings.outcome("study-9", "supported", [findings.scatter()], 3, study=evil),
        findings.outcome("study-11", number=4, finding=None, state="interrupted", done=3)])


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A checkout of its own: where it is, and the README in it."""
    findings.listed(monkeypatch)
    monkeypatch.setattr(lab_page, "PAGE", tmp_path / "docs" / "lab.md")
    monkeypatch.setattr(lab_page.report, "README", tmp_path / "README.md")
    for name in ("keep", "load"):
        monkeypatch.setattr(getattr(lab_page, name), "__defaults__", (tmp_path / "kept",))
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_findings_are_kept_without_the_paths_of_the_machine(made, tmp_path):
    kept = lab_page.keep(made, tmp_path)
    assert sorted(o.name for o in kept) == ["study-5", "study-7", "study-9"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study-5", "study-7", "study-9"]
    text = (tmp_path / "study-7" / "finding.json").read_text()
    assert "/home/someone" not in text
    assert json.loads(text)["machine"]["cpu"] == "znver4"
    assert results.load(tmp_path, "study-7").finding == results.load(made, "study-7").finding
    with pytest.raises(ValueError, match="holds no finding"):
        lab_page.keep(tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize("changes", [
    {"scale": "full"}, {"data": "mnist"}, {"command": "nbgrad lab run study-7 --seeds 3"}])
def test_findings_of_other_settings_are_refused(changes, tmp_path):
    """Nothing is kept, not even what could be; a study that needs no data can."""
    folder = findings.write(tmp_path / "lab", [
        findings.outcome("study-5", data=""), findings.outcome("study-7", **changes)])
    with pytest.raises(ValueError, match=r"own seeds, got others of study-7$"):
        lab_page.keep(folder, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    findings.write(folder, [findings.outcome("study-7")])
    assert len(lab_page.keep(folder, tmp_path / "kept")) == 2


def test_the_readme_says_what_the_files_say(made, there):
    assert lab_page.main([str(made)]) == 0
    text = (there / "README.md").read_text()
    assert text.startswith("Before.\n\n<!-- table: lab -->\n| claim | verdict |")
    assert text.endswith("<!-- end: lab -->\n\nAfter \\1.\n")
    rows = re.findall(r"^\| \[(.*)\]\(docs/lab.md#(.*?)\) \| \*\*(.*?)\*\* \| (.*) \|$", text, re.M)
    assert {name: verdict for _, name, verdict, _ in rows} == {
        "study-5": "not supported", "study-7": "depends", "study-9": "supported"}
    assert rows[0][3] == "Someone & Other 2001"
    assert "znver4 with 2 cores; 2026-11-20." in text
    assert "numba 0.68.1 (`nbgrad lab run --all`" in text
    files = re.findall(r"^!\[.*\]\((docs/lab/.*\.png)\)$", text, re.M)
    assert files == ["docs/lab/study-5-1.png", "docs/lab/study-9-1.png"]
    assert all((there / file).read_bytes().startswith(b"\x89PNG") for file in files)
    assert lab_page.main([]) == 0                       # from what was kept: nothing changes
    assert (there / "README.md").read_text() == text


def test_the_page_has_every_study_and_its_pictures(made, there):
    assert lab_page.main([str(made)]) == 0
    text = (there / "docs" / "lab.md").read_text()
    links = re.findall(r"\]\(#(.*?)\)", text)
    assert "2.3 times \\[1.9, 2.8\\]" in text.split("<a id")[0]
    assert sorted(links) == ["study-5", "study-7", "study-9"]
    assert all(f'<a id="{name}"></a>' in text for name in links)
    files = re.findall(r"^!\[.*\]\((.*)\)$", text, re.M)
    assert sorted(files) == ["lab/study-5-1.png", "lab/study-9-1.png"]
    assert all((there / "docs" / file).exists() for file in files)
    assert "| batch norm | 10⁻⁵ | 0.934 \\[0.918, 0.947\\] | 1,250 | 0/5 |" in text
    assert "<script>" not in text
    assert "Run it again: `nbgrad lab run study-7`" in text
    assert text.count("\nChanged: Seeds were raised after a first run.") == 2   # one is hostile
    assert text.count("With 5 seeds the interval is the range of the values") == 1
    assert text.count("which is not to say that they show its opposite") == 1


def test_without_results_it_says_what_to_do(there, capsys):
    assert lab_page.main([]) == 2
    assert "nbgrad lab run --all" in capsys.readouterr().err
    assert lab_page.main(["--help"]) == 2
    assert (there / "README.md").read_text() == README
