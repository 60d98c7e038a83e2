"""nbgrad lab list and nbgrad lab run."""

import subprocess
import sys
import types

import pytest

from nbgrad.cli import main
from nbgrad.data.idx import HINTS
from nbgrad.lab import Figure, Finding, Series, Study, Table, judging, results, studies
from tests.test_data_files import write_mnist

HINT = HINTS["mnist"]


def run(cell):
    if cell.get("bad"):
        raise ValueError("no such thing")
    return {"value": cell["seed"], "data": cell.get("data", "digits")}


def judge(records, cells):
    values = [r["value"] for r in records]
    return Finding("supported", f"The values are {values} on {records[0]['data']}.",
                   Table(["seed", "value"], [[v, v] for v in values]),
                   [Figure("t", "x", "y", [Series("s", values, values)])], ["A note."])


def made(name, bad=False, data=("digits",)):
    texts = dict.fromkeys(("source", "published", "setup", "rule"), "-")
    return Study(name=name, question=f"Is it {name}?", claim=f"It is {name}.", **texts, run=run,
                 judge=judge, data=data,
                 cells=lambda scale: [{"seed": i, "bad": bad, "scale": scale} for i in range(2)])


@pytest.fixture
def lab(monkeypatch, tmp_path, capsys):
    """lab(*words) -> (status, stdout, stderr), of a laboratory of three studies."""
    own = {1: "one_thing", 2: "other", 9: "broken"}
    for module in own.values():
        fake = types.ModuleType(f"nbgrad.lab.studies.{module}")
        data = {"one_thing": ("digits", "mnist"), "other": ()}.get(module, ("digits",))
        fake.STUDY = made(module.replace("_", "-"), module == "broken", data)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for number in list(studies.STUDIES):
        monkeypatch.delitem(studies.STUDIES, number)
    for number, module in own.items():
        monkeypatch.setitem(studies.STUDIES, number, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judging, "SEEDS", 1)

    def call(*words):
        status = main(["lab", *words, *(["--jobs", "0"] if words[0] == "run" else [])])
        return status, *capsys.readouterr()
    return call


def test_list_shows_numbers_names_and_questions(lab):
    status, out, _ = lab("list")
    assert status == 0
    assert [line.split(maxsplit=2) for line in out.splitlines()[2:]] == [
        ["1", "one-thing", "Is it one-thing?"], ["2", "other", "Is it other?"],
        ["9", "broken", "Is it broken?"]]


def test_run_says_verdict_sentence_table_and_notes(lab, tmp_path):
    status, out, err = lab("run", "one-thing")
    assert status == 0
    assert out.splitlines() == [
        "one-thing: supported", "=" * 20, "claim: It is one-thing.",
        "data: UCI digits", "",
        "The values are [0, 1] on digits.", "", "seed  value", "----  -----", "   0      0",
        "   1      1", "", "- A note.", "", "runs/lab/verdicts.md",
        "A page with the pictures: nbgrad lab report"]
    assert "one-thing: supported (2 cells, 0 s)" in err
    assert results.load(tmp_path / "runs" / "lab", "one-thing").scale == "quick"
    text = (tmp_path / "runs" / "lab" / "verdicts.md").read_text()
    assert "| one-thing | It is one-thing. | **supported** | The values are [0, 1]" in text


def test_several_end_with_all_verdicts_and_a_failure_is_a_status(lab, tmp_path):
    status, out, err = lab("run", "--all", "--out", "here", "--full", "--quiet")
    assert status == 1
    assert "0 of 2 cells are done\nseed=0, bad=True, scale=full: ValueError: no such thing" in out
    assert out.splitlines()[-6:] == [
        "one-thing  UCI digits  supported        0", "other      –           supported        0",
        "broken     UCI digits  failed           0", "", "here/verdicts.md",
        "A page with the pictures: nbgrad lab report --out here"]
    assert err == "nbgrad: failed: broken; here/<study>/finding.json says where\n"
    assert results.load(tmp_path / "here", "one-thing").command == "nbgrad lab run one-thing --full"
    lab("run", "other", "--out", "here")
    rows = (tmp_path / "here" / "verdicts.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| one-thing", "| other", "| broken"]


def test_seeds_data_and_root(lab, tmp_path):
    status, out, _ = lab("run", "one-thing", "--seeds", "3")
    assert (status, "[0, 1, 2]" in out) == (0, True)
    assert lab("run", "one-thing", "--data", "mnist") == (
        2, "", f"nbgrad: error: dataset 'mnist' needs root, the folder of its files: {HINT}\n")
    missing = "mnist: missing train-images-idx3-ubyte, train-labels-idx1-ubyte in"
    assert lab("run", "one-thing", "--data", "mnist", "--root", str(tmp_path)) == (
        2, "", f"nbgrad: error: {missing} '{tmp_path}'; {HINT}\n")
    for prefix, n in (("train", 30), ("t10k", 20)):
        write_mnist(tmp_path, prefix, n, 0)
    status, out, err = lab("run", "one-thing", "other", "--data", "mnist", "--root", str(tmp_path))
    assert (status, "The values are [0, 1] on mnist." in out) == (0, True)
    assert "other: it needs no data: runs without --data mnist\n" in err
    assert [line.split()[1:2] for line in out.splitlines() if line.startswith("data: ")] == [
        ["MNIST"], ["none"]]
    one = results.load(tmp_path / "runs" / "lab", "one-thing")
    assert (one.data, one.command) == (
        "mnist", "nbgrad lab run one-thing --data mnist --root FOLDER")
    assert one.study["setup"] == (
        "Here on MNIST (30 training and 20 test images) instead of the digits; otherwise: -")
    other = results.load(tmp_path / "runs" / "lab", "other")
    assert (other.data, other.study["setup"]) == ("", "-")


@pytest.mark.parametrize(("words", "says"), [
    (["one-thin"], "there is no study 'one-thin'; do you mean 'one-thing'?"),
    (["zzz"], "there is no study 'zzz': `nbgrad lab list` shows them"),
    ([], "name one or more studies (see nbgrad lab list), or give --all"),
    (["other", "--all"], "name one or more studies (see nbgrad lab list), or give --all"),
    (["other", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
    (["other", "--data", "cifar10"], "--data: cifar10 is not for other: it needs no data"),
    (["--all", "--data", "cifar10"],
     "--data: cifar10 is not for one-thing: it runs on digits, mnist"),
])
def test_what_cannot_be_run_says_why(lab, words, says):
    assert lab("run", *words) == (2, "", f"nbgrad: error: {says}\n")


def test_a_study_may_be_named_by_its_number(lab):
    status, out, _ = lab("run", "2", "other", "--quiet", "--out", "a b")
    assert (status, out.splitlines()[0]) == (0, "other: supported")
    assert out.count("other: supported") == 1
    assert out.splitlines()[-1] == "A page with the pictures: nbgrad lab report --out 'a b'"
    assert lab("run", "3")[2].startswith("nbgrad: error: there is no study '3'")


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(lab, tmp_path):
    (tmp_path / "file").write_text("")
    for out, says in (("file", "file is a file; expected a folder, or a name for a new one"),
                      ("file/deep", "file/deep cannot be made: Not a directory")):
        status, said, err = lab("run", "other", "--out", out)
        assert (status, said, err) == (2, "", f"nbgrad: error: --out: {says}\n")


def test_a_report_of_a_folder_without_results_says_where_it_looked(lab, tmp_path):
    assert lab("report", "--out", "nowhere") == (
        2, "", "nbgrad: error: neither nowhere nor runs/lab holds results of `nbgrad lab run`\n")
    lab("run", "other", "--out", "here")
    (tmp_path / "here" / "other" / "finding.json").unlink()         # killed before it could judge
    assert lab("report", "--out", "here")[:2] == (
        0, "here/report.html\nhere/report.md\nhere/verdicts.csv\n")


def test_help_imports_nothing_heavy():
    code = ("import sys\nfrom nbgrad.cli import main\n"
            "try:\n    main(['lab', 'run', '--help'])\nexcept SystemExit:\n    pass\n"
            "print(sorted({'numpy', 'numba', 'rich'} & set(sys.modules)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.splitlines()[-1] == "[]", out.stderr
