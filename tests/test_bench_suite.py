"""The benchmark suite: what its sides compute, how they are asked, what the answers become."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bench import (
    ROOT,
    __main__ as program,
    ceilings,
    limits,
    measure,
    on_nbgrad,
    report,
    suite,
    tables,
    worker,
)

CASES = {group: suite.table(group, 6) for group in suite.GROUPS}
SAME = [case for cases in CASES.values() for case in cases if not case.random]


def arrays(result):
    """What a call returned, as NumPy arrays."""
    results = result if isinstance(result, tuple | list) else (result,)
    return [r.detach().numpy() if hasattr(r, "detach") else np.asarray(r) for r in results]


def named(case):
    return f"{case.group} {case.label}"


def same(got, want):
    """Sums of a few hundred products of size 1, in float32: 1e-4 is a hundred roundings."""
    for a, b in zip(arrays(got), arrays(want)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ the table

@pytest.mark.parametrize("group", suite.GROUPS)
def test_cases_have_names_of_their_own_and_start_with_us(group):
    full = suite.table(group)
    assert len({case.label for case in full}) == len(full) == len(CASES[group])
    assert all(case.sides[0] == "nbgrad" and case.group == group for case in full)


def test_costs_of_a_product_a_convolution_and_a_norm():
    def find(group, label):
        return next(case for case in suite.table(group) if case.label == label)
    product = find("matmul", "float64, 512")
    assert (product.flops, product.bytes) == (2 * 512 ** 3, 3 * 512 ** 2 * 8)
    conv = find("conv", "forward, resnet20 16->32 3x3/2 @32")
    assert conv.flops == 2 * 128 * 16 * 16 * 32 * 16 * 9
    assert conv.bytes == 4 * (128 * 16 * 32 * 32 + 32 * 16 * 9 + 128 * 32 * 16 * 16)
    size = 4 * 128 * 16 * 32 * 32
    assert find("norm", "forward NCHW, 128x16x32x32").bytes == 2 * size
    assert find("norm", "backward NCHW, 128x16x32x32").bytes == 3 * size


# ------------------------------------------------------------------------- what each side computes

@pytest.mark.parametrize("case", [c for c in SAME if c.op not in ("optimizer_step",)], ids=named)
def test_our_side_computes_what_the_reference_does(case):
    same(on_nbgrad.build(case)(), on_nbgrad.build(case, "reference")())


@pytest.mark.parametrize(("case", "side"), [(c, s) for c in SAME for s in c.sides[1:]
                                            if "compiled" not in s], ids=str)
def test_every_side_computes_the_same(case, side):
    library, _, how = side.partition(" ")
    pytest.importorskip(library)
    module = pytest.importorskip(f"bench.on_{library}")
    same(module.build(case, how)(), on_nbgrad.build(case)())


@pytest.mark.parametrize("name", ["resnet20", "lenet", "mlp"])
@pytest.mark.parametrize("how", ["", "channels-last"])
def test_steps_on_both_sides_are_of_one_network(name, how, monkeypatch):
    torch = pytest.importorskip("torch")
    from bench import on_torch

    ours, theirs = on_nbgrad.network(name), on_torch.network(name, how)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert tuple(q.shape) == p.shape
            q.copy_(torch.from_numpy(p.data))
    monkeypatch.setattr(on_nbgrad, "network", lambda _: ours)
    monkeypatch.setattr(on_torch, "network", lambda *_: theirs)
    case = next(c for c in suite.table("step") if c.name.startswith(name))
    case = case._replace(settings={**case.settings, "batch": 8})
    steps = on_nbgrad.build(case), on_torch.build(case, how)
    losses = np.array([[step().item() for step in steps] for _ in range(4)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=2e-3)  # batch norm of 8 amplifies
    assert losses[-1, 0] < losses[0, 0]


def test_dropout_drops_half():
    case = next(c for c in suite.table("elementwise", 64) if c.kind == "dropout")
    y = on_nbgrad.build(case)().numpy()
    assert 0.4 < (y == 0).mean() < 0.6


def test_ceilings_copy_and_multiply():
    np.testing.assert_array_equal(ceilings.copy(1 << 18)(), np.ones(1 << 16, np.float32))
    flops = 4 * ceilings.PIECES * ceilings.CHAINS * 2 * 16
    for dtype in ("float32", "float64"):
        sums = ceilings.fma(dtype, flops)()
        # v = v/2 + 1/2 from 1/2, four times and more: 1 - 2^-5 in each of 12 × 16 lanes or more
        assert np.isfinite(sums).all()
        assert (sums == sums[0]).all()
        assert sums[0] > 0.9 * ceilings.CHAINS * 4


# ---------------------------------------------------------------------------------- asking a side

class Fake:
    """A library in which a call takes what the test's clock says."""

    @staticmethod
    def build(case, how):
        if how == "broken":
            raise ValueError("no such\nthing")
        return lambda: np.full(3, -2.0)


def test_a_timer_answers_with_seconds_sums_and_errors(monkeypatch):
    calls = []

    def clock(call, n):
        calls.append(n)
        return 0.25 * n
    monkeypatch.setattr(measure, "clock", clock)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    timer = worker.Timer(Fake, CASES["matmul"][:2], seconds=2)
    first = timer[f"fake | {CASES['matmul'][0].label}"]()
    assert first == {"seconds": 0.25, "sums": [6.0]}
    assert calls == [1, 2, 4, 8]              # 8 of 0.25 s are the two seconds
    assert timer[f"fake | {CASES['matmul'][0].label}"]() == first
    assert calls == [1, 2, 4, 8, 8]
    assert timer[f"fake broken | {CASES['matmul'][1].label}"]() == {"error": "ValueError: no such"}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_what_a_call_needs_and_not_what_its_inputs_took():
    def build():
        np.ones(30_000_000)                                   # 240 MB, gone before the call
        kept = np.ones(4_000_000)                             # 32 MB
        return lambda: (kept + 1) * 2                         # up to 64 MB more
    peak = worker.peak_memory(build)
    assert 60e6 < peak < 140e6


class Asked:
    """Sides that answer at once."""

    def __init__(self, answers):
        self.answers, self.errors, self.workers = answers, {}, {}

    def seconds(self, side, case):
        return self.answers[side]

    def fresh(self, side, case):
        return {"first": 2.0, "peak": 1000}


def test_sides_that_fail_or_are_not_installed_are_left_out(monkeypatch):
    case = CASES["matmul"][0]
    found = program.measured(case, Asked({"nbgrad": 1.0, "numpy": None, "torch": 3.0}), 2, True,
                             None)
    torch = {"torch": {"seconds": [3.0, 3.0], "first": 2.0, "peak": 1000}}
    ours = {"nbgrad": {"seconds": [1.0, 1.0], "first": 2.0, "peak": 1000}}
    assert found in (ours, ours | torch)
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: name == "nbgrad" or None)
    assert program.measured(case, Asked({"nbgrad": 1.0}), 2, True, None) == ours


def test_a_side_with_other_results_is_left_out_and_named():
    sums = {"nbgrad": [10.0, 5.0], "numpy": [10.001, 5.0], "torch": [10.0, 6.0]}
    for case, left_out in ((CASES["matmul"][0], ["torch"]), (CASES["step"][0], [])):
        sides = program.Sides("matmul", 1, 6, None)
        for side, found in sums.items():
            sides.workers[side] = lambda line, found=found: {"seconds": 0.5, "sums": found}
        answers = {side: sides.seconds(side, case) for side in sums}
        assert [side for side, seconds in answers.items() if seconds is None] == left_out
        assert sides.errors == {f"{case.label}, {side}": "other results than nbgrad: "
                                "not comparable" for side in left_out}


def test_an_interrupt_keeps_what_was_measured(monkeypatch):
    def seconds(self, side, case):
        if case.label == CASES["matmul"][2].label:
            raise KeyboardInterrupt
        return 0.5
    monkeypatch.setattr(program.Sides, "seconds", seconds)
    args = program.parse(["matmul", "--limit", "6", "--rounds", "1", "--out", "elsewhere"])
    rows, interrupted = program.run("matmul", CASES["matmul"], args, program.Steps(program_bar()))
    assert interrupted
    cases = list(dict.fromkeys(row["case"] for row in rows if row["group"] == "matmul"))
    assert cases == [case.name for case in CASES["matmul"][:2]]


def program_bar():
    from nbgrad.train.progress import Silent

    return Silent()


def test_the_program_measures_prints_and_keeps(tmp_path):
    command = [sys.executable, "-m", "bench", "matmul", "--limit", "6", "--rounds", "2", "--only",
               "float32, 64$", "--threads", "1", "--fresh", "--out", tmp_path]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    rows = measure.read(tmp_path / "matmul.csv")
    assert [row["case"] for row in rows[:3]] == ["copy", "fma float32", "fma float64"]
    ours = next(row for row in rows if row["case"] == "64" and row["side"] == "nbgrad")
    assert ours["threads"] == "1"
    assert ours["rounds"] == "2"
    assert float(ours["flops"]) == 2 * 6 ** 3
    assert float(ours["first"]) > 0
    assert "float32, 64" in out.stdout
    assert (tmp_path / "matmul-1.png").stat().st_size > 10_000


def test_options_that_make_no_sense_are_refused(capsys):
    for argv in (["nonsense"], ["--rounds", "0"], ["--threads", "0"], ["--limit", "8"]):
        with pytest.raises(SystemExit) as left:
            program.main(argv)
        assert left.value.code == 2
    assert "no such group: nonsense" in capsys.readouterr().err


def test_the_command_line_hands_all_options_over(capsys, monkeypatch, tmp_path):
    from nbgrad import cli

    assert cli.main(["bench", "--list", "--only", "forward, lenet"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == ["conv forward, lenet 1->6 5x5 @28", "conv forward, lenet 6->16 5x5 @14",
                      "elementwise max_pool forward, lenet", "elementwise avg_pool forward, lenet"]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "nbgrad" / "cli.py"))
    assert cli.main(["bench", "matmul"]) == 2
    assert "bench: needs a checkout" in capsys.readouterr().err


def test_a_checkout_that_is_not_installed_can_be_measured():
    code = ("import sys\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
            "sys.path_hooks[:] = [h for h in sys.path_hooks if '__editable__' not in repr(h)]\n"
            "import bench\n"
            "from nbgrad.kernels import reference\n"
            "import nbgrad.kernels\n"
            "print(nbgrad.kernels.__file__)")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         timeout=60, check=True)
    assert out.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


# ------------------------------------------------------------------------- what is made of answers

RUN = {"date": "2031-02-03T04:05:06+00:00", "machine": "Some CPU", "cores": 4, "threads": 2,
       "versions": "python 3.12"}


def made_up():
    """A copy of 10 GB/s and 100 GFLOP/s; two products, one of which moves more than it computes."""
    rates = {"copy": 1e10, "float32": 1e11, "float64": 5e10}
    machine = [suite.Case("machine", "machine", "copy", "copy", {}, ("nbgrad",), bytes=1e9),
               suite.Case("machine", "machine", "fma float32", "fma", {}, ("nbgrad",), 1e9)]
    sides = ("nbgrad", "torch", "numpy")
    big = suite.Case("matmul", "float32", "big", "matmul", {}, sides, 1e9, 1e6)
    thin = suite.Case("matmul", "float32", "thin", "matmul", {}, sides, 1e6, 1e8)
    rows = tables.rows(machine[0], {"nbgrad": {"seconds": [0.1]}}, RUN, rates)
    rows += tables.rows(machine[1], {"nbgrad": {"seconds": [0.01]}}, RUN, rates)
    rows += tables.rows(big, {"nbgrad": {"seconds": [0.02], "first": 1.5, "peak": 2_000_000},
                              "torch": {"seconds": [0.01]}, "numpy": {"seconds": [0.04]}},
                        RUN, rates)
    return rows + tables.rows(thin, {"nbgrad": {"seconds": [0.02, 0.01, 0.04]},
                                     "torch": {"seconds": [0.16]}}, RUN, rates)


def test_a_ceiling_is_the_median_rate():
    assert tables.ceiling(suite.MACHINE[0], {"nbgrad": {"seconds": [1, 2, 4]}}) == {
        "copy": suite.MACHINE[0].bytes / 2}
    assert tables.ceiling(suite.MACHINE[2], {"nbgrad": {"seconds": [1, 2, 4]}}) == {
        "float64": suite.MACHINE[2].flops / 2}


def test_a_table_has_rates_shares_of_the_ceiling_and_ratios():
    header, lines = tables.details(made_up())
    assert header == ["case", "nbgrad", "rate", "ceiling", "first call", "peak",
                      "torch", "×", "first call", "peak", "numpy", "×", "first call", "peak"]
    assert lines[0][:3] == ["nbgrad copy", "100 ms", "10 GB/s"]
    assert lines[2] == ["float32, big", "20.0 ms", "50 GFLOP/s", "50 %", "1.50 s", "2.0 MB",
                        "10.0 ms", "0.50", "", "", "40.0 ms", "2.00", "", ""]
    assert lines[3][:8] == ["float32, thin", "20.0 ms ±", "5 GB/s", "50 %", "", "", "160 ms",
                            "8.00"]
    assert {len(line) for line in lines} == {len(header)}


def test_ratios_are_summed_up_by_their_geometric_mean_and_the_least():
    assert tables.summary(made_up())[1] == [
        ["float32", "2", "torch", "2.00", "0.50"], ["float32", "1", "numpy", "2.00", "2.00"],
        ["float32", "2", "the best of them", "2.00", "0.50"]]


def test_our_own_composition_is_no_peer():
    rows = made_up()
    composed = [{**row, "side": tables.COMPOSED, "median": "1e-3"} for row in rows
                if row["side"] == "nbgrad" and row["group"] != "machine"]
    found = tables.ratios(rows + composed)["float32"]
    assert found[tables.BEST] == tables.ratios(rows)["float32"][tables.BEST]
    assert len(found[tables.COMPOSED]) == len(composed)


def test_tables_print_with_rich_and_without(capsys, monkeypatch):
    tables.print_table(made_up())
    rich = capsys.readouterr().out
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    tables.print_table(made_up())
    plain = capsys.readouterr().out
    for text in (rich, plain):
        assert "float32, thin" in text
        assert "20.0 ms ±" in text


def test_a_file_keeps_the_newest_of_every_case(tmp_path):
    path = tmp_path / "new" / "matmul.csv"
    rows = made_up()
    measure.replace(path, rows)
    newer = [{**rows[2], "median": "7"}, {**rows[-1], "threads": "1"}]
    measure.replace(path, newer)                     # the others of rows[2]'s case are gone
    assert measure.read(path) == rows[:2] + newer[:1] + rows[5:] + newer[1:]


def test_a_roofline_has_a_dot_for_every_side(tmp_path):
    plt = pytest.importorskip("matplotlib.image")
    from bench import roofline

    assert roofline.draw(made_up(), tmp_path / "roof.png")
    assert not roofline.draw([], tmp_path / "none.png")
    pixels = (255 * plt.imread(tmp_path / "roof.png")[:, :, :3]).astype(int)
    for colour in ("nbgrad", "torch", "numpy"):
        rgb = [int(roofline.COLOURS[colour][i:i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=2) < 70).sum() > 20


def test_the_tables_of_the_readme_from_made_up_files(tmp_path):
    measure.replace(tmp_path / "matmul.csv", made_up())
    step = [{**row, "group": "step", "kind": "training step", "case": "lenet", "peak": peak}
            for row, peak in zip(made_up()[2:4], ("2000000", "5000000"))]
    measure.replace(tmp_path / "step.csv", step)
    text = "".join(f"<!-- table: {name} -->\n<!-- end: {name} -->\n" for name in report.SUITE)
    once = report.write(text, tmp_path)
    assert report.write(once, tmp_path) == once
    assert "| matmul: float32 | 2 | 2 | 2.00 (2.00) | 2.00 (0.50) |  | 2.00 (0.50) |\n" in once
    assert "Some CPU, 4 cores;\npython 3.12; 2031-02-03" in once
    assert "| lenet | 2 | torch | 10.0 ms | 0.50 |  | 5.0 MB | 2.50 |\n" in once


def test_what_memory_allows_from_a_made_up_file():
    """A copy of 10 GB/s; x of 100 MB: read and written once in 20 ms, by two passes in 30."""
    def norm(kind, size, **seconds):
        case = suite.Case("norm", kind, "x", "f", {}, tuple(seconds), 0, size)
        return tables.rows(case, {side: {"seconds": [s]} for side, s in seconds.items()}, RUN,
                           {"copy": 1e10, "float32": 1e11})
    rows = [*made_up()[:2], *norm("forward channels-last", 2e8, nbgrad=0.025, torch=0.05),
            *norm("backward NCHW", 3e8, nbgrad=0.1, torch=0.09, numpy=0.01),
            *norm("forward NCHW", 2e6, nbgrad=1, torch=2), *norm("forward rows", 2e9, nbgrad=1)]
    assert limits.rows_of(rows) == [
        ["forward channels-last, x", "25.0 ms", "120 %", "50.0 ms", "2.00", "1.67", "2.50"],
        ["backward NCHW, x", "100 ms", "50 %", "90.0 ms", "0.90", "1.80", "3.00"]]
    assert "Some CPU, 4 cores" in limits.page(rows)


def test_headlines_are_cases_of_the_table():
    labels = {(case.group, case.label) for group in suite.GROUPS for case in suite.table(group)}
    assert set(report.HEADLINES) <= labels


def test_fresh_answers_are_json():
    found = worker.fresh(on_nbgrad, CASES["matmul"][0], "")
    assert json.loads(json.dumps(found)).keys() == {"first", "peak"}
    assert found["first"] > 0
