"""docs/cuda.md is what the file of results says; occupancy is what NVIDIA's own rules give."""

import re
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from bench import measure, offline

ROWS = measure.read(offline.RESULTS)
CCS = sorted({row["cc"] for row in ROWS}, key=int)
wheels = pytest.mark.skipif(not all(map(find_spec, ("numba_cuda", "cupy", "cuda"))),
                            reason="needs nbgrad[cuda]")


def test_the_page_is_what_the_results_say():
    text = offline.PAGE.read_text(encoding="utf-8")
    assert offline.write(text, ROWS) == text
    assert re.findall(r"<!-- table: (\w+) -->", text) == [*(f"sm_{cc}" for cc in CCS), "run"]
    prose = offline.BLOCK.sub("", text)
    assert "<!--" not in prose                 # a marker without its end
    assert not re.search(r"\d ?([mµn]s|[GM]B/s|FLOP/s)\b", prose), "a number typed by hand"
    assert text.count("Nothing on this page was measured on a GPU") == 2


def test_the_hot_kernels_are_in_the_file_and_use_vectors():
    assert CCS[:3] == ["75", "80", "90"]
    for cc in CCS:
        rows = {row["name"]: row for row in ROWS if row["cc"] == cc}
        for name in offline.HOT.values():
            there = [rows[n] for n, _ in offline.hot(name, rows)]
            assert there or (cc == "75" and re.search("tf32|bf", name)), name
            for row in there:
                assert int(row["wide_loads"]) >= 2, row


def test_no_kernel_spills():
    assert not [(row["name"], row["cc"]) for row in ROWS if row["spilled"] != "0"]


# 65536 registers: 512 threads of 128, 384 of 168, 1536 of 40 (65536 / 40 = 1638), 2048 of 32.
# 80 KiB + 24.5 KiB of shared memory twice on Hopper (228), once on Ampere (164), not on Ada (100).
@pytest.mark.parametrize(("cc", "threads", "registers", "shared", "want"), [
    ((9, 0), 256, 128, 0, (16, 64)), ((9, 0), 384, 168, 0, (12, 64)),
    ((9, 0), 256, 40, 0, (48, 64)), ((9, 0), 256, 33, 0, (48, 64)), ((9, 0), 256, 32, 0, (64, 64)),
    ((9, 0), 32, 16, 0, (32, 64)),
    ((7, 5), 256, 33, 0, (32, 32)), ((12, 1), 256, 32, 0, (48, 48)), ((8, 6), 64, 32, 0, (32, 48)),
    ((9, 0), 256, 64, 0x1a200, (16, 64)), ((8, 0), 256, 64, 0x1a200, (8, 64)),
    ((8, 9), 256, 64, 0x1a200, (0, 48)), ((9, 0), 128, 64, 227 << 10, (4, 64))])
def test_occupancy(cc, threads, registers, shared, want):
    assert offline.warps(cc, threads, registers, shared) == want


@wheels
def test_kept_rows_replace_older_ones_and_those_of_no_kernel_go(tmp_path):
    from nbgrad.kernels.cuda import offline as assembler

    path, one = tmp_path / "offline.csv", assembler.Report("a_f4", (9, 0), *[1] * 10)
    least = {"a_f4": (0, 0), "add_f4": (8, 0)}
    offline.keep([one, one._replace(name="add_f4", registers=40), one._replace(cc=(8, 0)),
                  one._replace(name="of_old"), one._replace(name="add_f4", cc=(7, 5))],
                 {"a_f4": (0, 0), "add_f4": (0, 0), "of_old": (0, 0)}, path)
    assert len(measure.read(path)) == 5
    offline.keep([one._replace(spilled=8)], least, path)
    rows = measure.read(path)
    assert [(r["name"], r["cc"], r["spilled"]) for r in rows] == [
        ("a_f4", "80", "1"), ("a_f4", "90", "8"), ("add_f4", "90", "1")]
    blocks = "".join(f"<!-- table: {name} -->\n<!-- end -->" for name in ("sm_90", "run"))
    text = offline.write(blocks, rows)
    assert "| x + y | 1 | 40 | 1 | 0.0 | 1 of 1 | 1 of 1 | 32 of 64 |" in text
    assert "2 kernels, 3 times assembled, 3 of them with spilled registers" in text


@wheels
def test_the_file_has_every_kernel_and_no_other():
    """For each generation that can run it. Where this fails: python -m bench.offline --keep, then
    --page."""
    from nbgrad.kernels.cuda import offline as assembler

    every = {kernel.name: kernel.least for kernel in assembler.every_kernel()}
    want = {(name, cc) for name, least in every.items() for cc in CCS
            if offline._cc(cc) >= least}
    assert {(row["name"], row["cc"]) for row in ROWS} == want
    for name in offline.HOT.values():
        assert offline.hot(name, every), name


@wheels
def test_the_command_counts_what_fails_or_spills(capsys, monkeypatch):
    from nbgrad.kernels.cuda import offline as assembler

    monkeypatch.setattr(offline, "SHARES", 1)
    monkeypatch.setattr(offline, "ProcessPoolExecutor",
                        lambda n, initializer: nullcontext(SimpleNamespace(map=map)))
    assert offline.main(["^(add|sub)_f4$", "--cc", "75", "90"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["add_f4", "7.5"], ["add_f4", "9.0"], ["sub_f4", "7.5"], ["sub_f4", "9.0"],
                     ["4", "assembled;"]]

    def reports(kernel, ccs):
        if kernel.name == "sub_f4":
            raise RuntimeError("no such instruction")
        yield assembler.Report(kernel.name, ccs[0], *[1] * 10)
    monkeypatch.setattr(assembler, "reports", reports)
    assert offline.main(["^(add|sub)_f4$", "--cc", "90"]) == 2
    out = capsys.readouterr().out
    assert "sub_f4 [(9, 0)]: RuntimeError: no such instruction\n" in out
    assert "1 assembled; 2 fail or spill" in out


@wheels
def test_a_block_has_a_new_multiprocessor_to_itself_where_it_needs_the_registers():
    """Whether the front end has run for that device or for several."""
    from nbgrad.kernels.cuda import offline as assembler

    kernel, = (k for k in assembler.every_kernel() if k.name == "sums_bf_8_columns")
    ccs = [(9, 0), assembler.capabilities()[-1]]
    for texts in (map(kernel.ptx, ccs), kernel.ptx_of_each(ccs)):
        assert [re.findall(r"\.minnctapersm (\d+)", ptx) for ptx in texts] == [["2"], ["1"]]
