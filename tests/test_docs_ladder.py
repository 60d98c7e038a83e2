"""The ladders of docs/: rungs compute what the reference does, pages show what was run."""

import re

import numpy as np
import pytest
from nbgrad.kernels.cpu import jit

from bench import ladder, measure, on_nbgrad, suite

PAGES = sorted(ladder.DOCS.glob("*.md"))
LADDERS = [page for page in PAGES if page.stem.endswith("-ladder")]
NORMS = [kind for kind in ladder.LADDERS if kind != "matmul"]
EPS = np.finfo(np.float32).eps
ROUGH = ("numpy_formula", "one_pass")          # float32 sums of all values, one after the other


def rungs(kind):
    """(name of the function, the function) of a ladder; ours only once."""
    found = (ladder.rung_of(ladder.LADDERS[kind], how) for how in ladder.LADDERS[kind].rungs)
    return {f.__name__: f for f in found}.items()


# below a vector and with rests; in the pool, where memory is aligned, in whole vectors
@pytest.mark.parametrize("shape", [(3, 11, 7, 11), (2, 32, 32, 32)])
@pytest.mark.parametrize("kind", NORMS)
def test_batch_norm(kind, shape):
    x, gamma, beta = ladder.arguments(kind, shape)
    before = x.copy()
    want = ladder.exact(kind, x, gamma, beta)
    for name, f in rungs(kind):
        y = f(x, gamma, beta)
        roundings = np.sqrt(x.size / shape[1]) if name in ROUGH else 4
        np.testing.assert_allclose(y, want, rtol=0, atol=roundings * EPS * np.abs(want).max(),
                                   err_msg=name)
        assert y.dtype == np.float32
        np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("kind", NORMS)
def test_one_pass_is_wrong_at_an_offset_and_the_others_are_not(kind, monkeypatch):
    monkeypatch.setattr(ladder, "SMALL", (3, 11, 7, 11))
    errors = {row["side"]: float(row["error"]) for row in ladder.errors() if row["kind"] == kind}
    assert errors.keys() == set(ladder.LADDERS[kind].rungs)
    for how, error in errors.items():
        if how == "one pass":
            assert error > 0.1                 # 27 bits of 24 cancel
        else:                                  # NumPy's mean is off by some units of 2^-10
            assert error < (2 ** -7 if how == "numpy formula" else 8 * EPS * 4), how


def test_matmul():
    a, b = ladder.arguments("matmul", (102, 132, 64))      # more than a block each way, and a rest
    want = ladder.exact("matmul", a, b)
    bound = 132 * EPS * (np.abs(a).astype(float) @ np.abs(b))
    for name, f in rungs("matmul"):
        assert (np.abs(f(a, b) - want) <= bound).all(), name


@pytest.mark.parametrize(("kind", "serial", "sizes"), [
    ("batch norm, NCHW", "streamed", (2, 32, 32, 32)),
    ("batch norm, channels-last", "streamed", (2, 32, 32, 32)),
    ("matmul", "panels", (102, 132, 64))])
def test_threads_do_not_change_a_bit(kind, serial, sizes, monkeypatch):
    monkeypatch.setattr(jit, "PARALLEL_BYTES", 1)
    args = ladder.arguments(kind, sizes)
    alone, together = (ladder.rung_of(ladder.LADDERS[kind], how)(*args)
                       for how in (serial, "threads"))
    assert alone.tobytes() == together.tobytes()


def test_the_suite_has_every_rung_and_its_ceilings():
    found = {}
    for case in suite.table("ladder", 8):
        found.setdefault(case.kind, []).append(case)
        assert case.flops > 0
        assert case.bytes > 0
    assert found.keys() == ladder.LADDERS.keys()
    for kind, (ceiling, rungs) in found.items():
        assert ceiling.name == "ceiling"
        assert ceiling.settings["op"] == ("fma" if kind == "matmul" else "copy")
        assert rungs.sides[0] == "nbgrad"
        hows = {side.partition(" ")[2] for side in rungs.sides}
        assert hows == set(ladder.LADDERS[kind].rungs)
        y, want = (on_nbgrad.build(rungs, how)() for how in ("threads", "reference"))
        np.testing.assert_allclose(y, want, atol=1e-4)     # 1e-4: some roundings of sums near 30


@pytest.mark.parametrize("page", LADDERS, ids=lambda page: page.stem)
def test_the_page_is_what_source_and_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert ladder.write(text) == text
    prose = ladder.BLOCK.sub("", text)
    assert "<!--" not in prose                 # a marker without its end
    assert not re.search(r"\d ?([mµn]s|[GM]B/s|GFLOP/s)\b", prose), "a number typed by hand"


@pytest.mark.parametrize("kind", ladder.LADDERS)
def test_every_rung_is_measured_and_told(kind):
    rows = measure.read(measure.RESULTS / "ladder.csv")
    sides = {row["side"].partition(" ")[2] for row in rows if row["kind"] == kind}
    assert sides == set(ladder.LADDERS[kind].rungs)
    pages = "".join(page.read_text(encoding="utf-8") for page in LADDERS)
    assert f"<!-- table: {kind} -->" in pages
    for how in ladder.LADDERS[kind].rungs:
        name = how.replace(" ", "_")
        shown = re.search(rf"<!-- code: ladder_[\w ]* _?{name}[ \w]*-->", pages)
        assert how in (*ladder.SHIPPED, "numpy") or shown, how


ROWS = """date,machine,cores,threads,versions,rounds,group,kind,case,side,median,flops,bytes
1,Old,2,2,v,3,ladder,matmul,768 × 768 × 768,nbgrad,9,1,1
2,New,2,2,v,3,ladder,matmul,ceiling,nbgrad,0.5,2e9,1
2,New,2,2,v,3,ladder,matmul,ceiling,nbgrad one thread,1,2e9,1
2,New,2,2,v,3,ladder,matmul,768 × 768 × 768,nbgrad dots,8,2e9,1
2,New,2,2,v,3,ladder,matmul,768 × 768 × 768,nbgrad panels,4,2e9,1
2,New,2,2,v,3,ladder,matmul,768 × 768 × 768,nbgrad threads,2,2e9,1
2,New,2,2,v,3,ladder,matmul,768 × 768 × 768,nbgrad one thread,2,2e9,1
2,New,2,2,v,3,ladder,matmul,768 × 768 × 768,nbgrad,1,2e9,1
"""
TABLE = """<!-- table: matmul -->
|  | time | GFLOP/s | of the ceiling | × the rung before |
| --- | --: | --: | --: | --: |
| 1. dots | 8.00 s | 0.25 | 12 % |  |
| 2. panels | 4.00 s | 0.5 | 25 % | 2.00 |
| 3. threads | 2.00 s | 1 | 25 % | 2.00 |
| 4. nbgrad, one thread | 2.00 s | 1 | 50 % | 2.00 |
| 5. nbgrad | 1.00 s | 2 | 50 % | 2.00 |

768 × 768 × 768, float32. Ceilings: 2 GFLOP/s of multiply-adds with one thread, 4 with 2.
Medians of 3 interleaved rounds: New, 2 cores;
v; 2 (`python -m bench ladder`).
<!-- end -->"""


def test_tables_are_the_newest_machines(tmp_path):
    (tmp_path / "ladder.csv").write_text(ROWS)
    empty = "<!-- table: matmul -->\n<!-- end -->"
    assert ladder.write(empty, tmp_path) == TABLE
    assert ladder.write(TABLE.replace("8.00", "7.00"), tmp_path) == TABLE
    assert ladder.write(empty, tmp_path / "nothing") == empty


def test_code_is_that_of_the_module():
    text = ladder.code("ladder_norm", ["_stored", "EPS", "_chunk"])
    stored, eps, first, *_ = text.split("\n\n")
    assert stored == "_stored, _streamed = _normalizing(simd.store), _normalizing(simd.stream)"
    assert eps == "EPS = 1e-5"
    assert first.startswith("@device\ndef _chunk(x, at, n):\n")
    with pytest.raises(KeyError, match="nothing"):
        ladder.code("ladder_norm", ["nothing"])


def test_the_index_lists_every_page_and_its_code_runs(capsys):
    text = (ladder.DOCS / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", text)) == {p.name for p in PAGES} - {"index.md"}
    if not jit.config.DISABLE_JIT:
        (script,) = re.findall(r"```python\n(.*?)```", text, re.S)
        exec(script, {})
        assert "vadd" in capsys.readouterr().out or not jit.machine()["features"]
