"""CUDA without a GPU: the simulator in a process of its own, machine code offline, bad devices."""

import os
import pickle
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nbgrad import backend, cuda, nn, tensor

ROOT = Path(__file__).resolve().parent.parent
SIMULATED = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "1"}
wheels = pytest.mark.skipif(not all(map(find_spec, ("numba_cuda", "cupy", "cuda"))),
                            reason="needs nbgrad[cuda]")


@pytest.mark.slow
def test_the_kernels_and_the_engine_in_the_simulator():
    """The switches are the process's, so the tests in tests/cuda run in one of their own."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                          "tests/cuda"], cwd=ROOT, env=SIMULATED, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is there")
def test_without_cupy_it_says_what_to_install():
    with pytest.raises(RuntimeError, match=r"'cuda' needs cupy: run `pip install 'nbgrad\[cuda\]'"):
        tensor([1.0]).to("cuda")
    with pytest.raises(RuntimeError, match=r"pip install 'nbgrad\[cuda\]'"):
        nn.Linear(2, 2).to("cuda")


WITHOUT_DRIVER = """
import nbgrad, nbgrad.cuda as cuda
assert not cuda.is_available() and cuda.device_count() == 0
for use in (lambda: nbgrad.ones(2).to("cuda"), lambda: nbgrad.nn.Linear(2, 2).to("cuda"),
            lambda: nbgrad.ones(2).pin_memory(), lambda: cuda.graph(lambda: 0), cuda.synchronize):
    try:
        use()
    except RuntimeError as e:
        print(e)
assert (nbgrad.ones(2) * 2).tolist() == [2, 2]
"""


@wheels
@pytest.mark.skipif(find_spec("cupy") is not None and cuda.is_available(), reason="a GPU is there")
def test_with_the_wheels_and_no_gpu_it_imports_and_says_so():
    """In a process of its own, where a warning is an error: CuPy is imported when asked for."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_DRIVER], cwd=ROOT,
                         capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert len(lines) == 5
    assert all(re.match(r"device 'cuda' is not there: no GPU", line) for line in lines), lines


@pytest.mark.parametrize(("error", "says"), [
    (ImportError("libcublas.so: not there"),
     r"'cuda' cannot be used: libcublas\.so: not there: run `pip install 'nbgrad\[cuda\]'`$"),
    (ModuleNotFoundError("No module", name="numba_cuda"), r"'cuda' needs numba_cuda: run `pip"),
    (ImportError("no such name", name="numba.cuda"), r"'cuda' needs numba\.cuda: run `pip")])
def test_what_does_not_load_is_said(error, says, monkeypatch):
    def failing(name):
        raise error
    monkeypatch.setattr(backend, "_cuda", None)
    monkeypatch.setattr(backend, "import_module", failing)
    with pytest.raises(RuntimeError, match=f"^device {says}"):
        tensor([1.0]).to("cuda")
    assert not cuda.is_available()
    assert backend.device_of(tensor([1.0]).data) == "cpu"


def test_an_error_of_our_own_is_not_hidden(monkeypatch):
    def failing(name):
        raise ImportError("cannot import name 'x'", name="nbgrad.kernels.cuda.launch")
    monkeypatch.setattr(backend, "_cuda", None)
    monkeypatch.setattr(backend, "import_module", failing)
    with pytest.raises(ImportError, match="cannot import name 'x'"):
        tensor([1.0]).to("cuda")


def test_the_simulator_needs_python_formulas():
    code = "import nbgrad; nbgrad.zeros(1, device='cuda')"
    env = {**SIMULATED, "NUMBA_DISABLE_JIT": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "set NUMBA_DISABLE_JIT=1, too" in run.stderr


def test_unknown_devices():
    for device in ("tpu", "cuda:x", "cpu:1"):
        with pytest.raises(RuntimeError, match=f"device '{device}' is not there"):
            backend.checked_device(device)
    assert backend.checked_device(None) == backend.checked_device("cpu:0") == "cpu"


@wheels
def test_hot_kernels_spill_nothing_and_use_vectors():
    """Bytes of memory per instruction are what these kernels live on."""
    from nbgrad.kernels.cuda import elementwise, offline, reduce

    f4, f8 = np.dtype(np.float32), np.dtype(np.float64)
    hot = [(elementwise.binary("add", f4), 4, 2), (elementwise.unary("gelu", f4), 2, 2),
           (elementwise.binary("relu_backward", f8), 4, 2), (reduce._rows("sum", f4, f4), 2, 0),
           (elementwise.spread("add", f4, "u4", True), 2, 1),
           (reduce._columns("sum", f4, f8), 0, 0)]
    for cc in offline.capabilities()[1:3]:
        for kernel, loads, stores in hot:
            r = offline.report(kernel, cc)
            assert (r.spilled, r.local) == (0, 0), r
            assert r.wide_loads >= loads, r
            assert r.wide_stores >= stores, r
            assert r.registers <= 64, r         # 1024 threads and more on a multiprocessor


@wheels
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimizers_use_vectors(dtype):
    """Two of each array in flight, and one alone in the tail, of tensors whose addresses are known
    when the kernel runs; all but the gradient are written."""
    from nbgrad.kernels.cuda import offline, optim

    for cc in offline.capabilities():
        for make, arrays in ((optim._sgd, 2), (optim._momentum, 3), (optim._adam, 4)):
            r = offline.report(make(np.dtype(dtype)), cc)
            assert (r.spilled, r.local) == (0, 0), r
            assert r.wide_loads >= 3 * arrays, r         # more, where a loop is written out
            assert r.wide_stores >= 3 * (arrays - 1), r
            assert r.registers <= 96, r         # 512 threads with 128 bytes each, and more


@wheels
def test_a_tuple_of_parameters_is_packed_one_by_one():
    """The entry's parameters in PTX are what launches pack, in that order."""
    from nbgrad.kernels.cuda import optim

    words = {"*": "u64", "i8": "u64", "i4": "u32", "f4": "f32", "f8": "f64"}
    for kernel in (optim._adam(np.dtype(np.float32)), optim._count()):
        entry = re.search(r"\.entry \w+\((.*?)\)", kernel.ptx((9, 0)), re.S)[1]
        got = re.findall(r"\.param\s+\.(\w+)", entry)
        assert got == [words[kind if kind in words else "*"] for kind in kernel.kinds]


@wheels
@pytest.mark.slow
def test_one_run_of_the_front_end_serves_every_device():
    """What is assembled of it is what a device's own run gives, but for lengths of names."""
    from nbgrad.kernels.cuda import offline

    kernels = {kernel.name: kernel for kernel in offline.every_kernel()}
    for name in ("add_f4_u4_vectors", "settled_bf", "dropout_f4", "matmul_f4_64_ks_rows"):
        kernel = kernels[name]
        got = [r._replace(size=0) for r in offline.reports(kernel, offline.capabilities())]
        want = [offline.report(kernel, cc)._replace(size=0) for cc in offline.capabilities()
                if cc >= kernel.least]
        assert got == want
        assert len(got) == 4 - (kernel.least > (7, 5))


def test_all_ptx_is_in_one_module():
    """Which is the one to write anew for another compiler."""
    says = re.compile(r"InlineAsm|\.asm\(|\b(cvt|mma|ldmatrix|cp\.async|ld)\.[a-z0-9.:]+ [{$[]")
    found = {path.name for path in (ROOT / "kernels" / "cuda").glob("*.py")
             if says.search(path.read_text(encoding="utf-8"))}
    assert found == {"ptx.py"}


@wheels
def test_other_processes_can_make_every_kernel():
    """By its recipe, which can be sent to them, and is what made it here."""
    from nbgrad.kernels.cuda import offline

    kernels = list(offline.every_kernel())
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        module, make, args, settings = pickle.loads(pickle.dumps(kernel.recipe))
        assert getattr(import_module(module), make)(*args, **settings) is kernel


@wheels
def test_hot_norms_spill_nothing_and_use_vectors():
    """Their threads hold 128 bytes in flight, so that 512 on a multiprocessor are enough."""
    from nbgrad.kernels.cuda import offline
    from nbgrad.kernels.cuda.loss import backward as cross_entropy_backward
    from nbgrad.kernels.cuda.moments import statistics
    from nbgrad.kernels.cuda.passes import gradient, normalize, sums
    from nbgrad.kernels.cuda.rows import forward as rows
    from nbgrad.kernels.cuda.single import single
    from nbgrad.kernels.cuda.single_backward import gradients
    from nbgrad.kernels.cuda.softmax import forward as softmax

    f4 = np.dtype(np.float32)
    how = (f4, f4, 4, True, "u4"), (f4, f4, 4, False, "u4")
    hot = [(statistics(*how[0]), 8, 0), (statistics(*how[1]), 8, 0), (normalize(*how[0]), 8, 4),
           (normalize(*how[1]), 8, 4), (single(*how[0]), 8, 1), (single(*how[1]), 8, 1),
           (gradients(*how[0]), 12, 1), (gradients(*how[1]), 12, 1),    # of y, too
           (sums(*how[1]), 8, 0), (gradient(*how[0]), 8, 4),
           (rows(f4, f4, 4, 256, True, False), 8, 8), (softmax("softmax", f4, 4, 32, True), 8, 8),
           (cross_entropy_backward(f4, 4, 32), 2, 1)]
    for kernel, loads, stores in hot:
        r = offline.report(kernel, (9, 0))
        assert (r.spilled, r.local) == (0, 0), r
        assert r.wide_loads >= loads, r
        assert r.wide_stores >= stores, r
        assert r.registers <= 128, r


# bytes of shared memory that a block may have, and that a multiprocessor has
SHARED = {(7, 5): (64 << 10, 64 << 10), (8, 0): (163 << 10, 164 << 10),
          (9, 0): (227 << 10, 228 << 10)}


@wheels
@pytest.mark.slow
@pytest.mark.parametrize("half", ["f2", "bf"])
@pytest.mark.parametrize("columns", [True, False])
def test_hot_norms_of_halves_spill_nothing(half, columns):
    """Eight halves to a load; γ and β of the same kind or float32."""
    from nbgrad.kernels.cuda import offline
    from nbgrad.kernels.cuda.layer_norm import column_sums
    from nbgrad.kernels.cuda.moments import dtypes, statistics
    from nbgrad.kernels.cuda.passes import gradient, normalize, sums
    from nbgrad.kernels.cuda.rows import backward, forward
    from nbgrad.kernels.cuda.single import single
    from nbgrad.kernels.cuda.single_backward import gradients

    f4, _, f2, bf = dtypes()
    dtype, params = {"f2": (f2, f2), "bf": (bf, f4)}[half]
    hot = (statistics, 4, 0), (normalize, 4, 2), (sums, 6, 0), (gradient, 6, 4), (single, 5, 1), (
        gradients, 6, 1)
    cases = [(make(dtype, params, 8, columns, "u4"), *least) for make, *least in hot]
    if not columns:                         # kernels of rows
        cases += [(forward(dtype, params, 8, 256, True, False), 12, 4),
                  (backward(dtype, params, 8, 256, True), 6, 2),
                  (column_sums(dtype, params, 8), 4, 0)]
    for kernel, loads, stores in cases:
        r = offline.report(kernel, (9, 0))
        assert (r.spilled, r.local) == (0, 0), r
        assert r.wide_loads >= loads, r
        assert r.wide_stores >= stores, r


@wheels
@pytest.mark.slow
def test_products_keep_their_sums_in_registers():
    """Two blocks of 256 threads to a multiprocessor. Tiles go to shared memory two steps ahead,
    past the registers: two vectors of each operand, ahead of (twice) and in the loop. Results go
    from there in vectors, in each half of the tile."""
    from nbgrad.kernels.cuda import offline, windows
    from nbgrad.kernels.cuda.matmul import _products
    from nbgrad.kernels.cuda.tile import LARGE

    f4, by_k, by_row = np.dtype(np.float32), ("k", True), ("row", True)
    for cc in ((8, 0), (9, 0), offline.capabilities()[-1]):
        for kernel in (_products(f4, LARGE, by_k, by_row),
                       _products(f4, LARGE, by_k, by_k),
                       windows.convolution(f4, LARGE, True, True),
                       windows.convolution(f4, LARGE, True, True, moments=True),
                       windows.weights(f4, LARGE, True, True)):
            r = offline.report(kernel, cc)
            assert (r.spilled, r.local) == (0, 0), r
            assert r.registers <= 128, r
            assert r.wide_stores >= 2, r
            most, all_of_it = SHARED.get(cc, (99 << 10, 100 << 10))
            assert r.shared <= most, r
            assert 2 * (r.shared + 1024) <= all_of_it, r        # 1024: what a block takes anyway
            found = offline.instructions(kernel, cc)
            assert found["LDGSTS"] == r.wide_loads == 12, (found, r)
            assert found["FFMA"] >= 128, found


@wheels
@pytest.mark.slow
def test_products_without_copies_to_shared_memory():
    """Before compute capability 8.0 the next step waits in registers."""
    from nbgrad.kernels.cuda import offline
    from nbgrad.kernels.cuda.matmul import _products
    from nbgrad.kernels.cuda.tile import LARGE

    kernel = _products(np.dtype(np.float32), LARGE, ("k", True), ("row", True), loads="plain")
    assert kernel.least == (0, 0)
    r = offline.report(kernel, (7, 5))
    assert (r.spilled, r.local) == (0, 0), r
    assert r.wide_loads == 8, r         # two of each operand, ahead of and in the loop
    assert r.shared <= 33 << 10, r
    assert offline.instructions(kernel, (7, 5))["LDGSTS"] == 0


@wheels
@pytest.mark.slow
@pytest.mark.parametrize(("half", "kind"), [("f2", "f16"), ("bf", "bf16")])
def test_products_of_halves_use_the_tensor_cores(half, kind):
    """16 products of fragments for 16 k, as often as the loop is written out, whose operands are
    read 4 matrices of 8 × 8 at a time; sums in registers."""
    from nbgrad.kernels.cuda import offline
    from nbgrad.kernels.cuda.matmul import WORD, _products
    from nbgrad.kernels.cuda.tile import LARGE
    from nbgrad.kernels.cuda.windows import convolution, weights

    by_k = ("k", True)
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    for kernel in (_products(WORD, LARGE, by_k, by_k, half, half),
                   convolution(WORD, LARGE, True, True, half, half),
                   convolution(WORD, LARGE, True, True, half, half, True),
                   weights(WORD, LARGE, True, True, half, "f4")):
        r = offline.report(kernel, (8, 0))
        assert (r.spilled, r.local) == (0, 0), r
        assert r.wide_stores >= 2, r            # eight halves of the result, or four of float32
        assert r.registers <= 128, r
        found = offline.instructions(kernel, (8, 0))
        assert found["LDGSTS"] == r.wide_loads == 12, (found, r)
        assert found["HMMA"] > 0
        assert found["HMMA"] % 16 == 0
        assert found["LDSM"] * 16 == found["HMMA"] * 6, found
        assert kernel.ptx((8, 0)).count(name) > 0


@pytest.mark.skipif(find_spec("cupy") is not None and cuda.is_available(), reason="a GPU is there")
def test_the_benchmark_says_that_there_is_no_gpu(capsys, tmp_path):
    from bench.cuda import main

    assert main(["--out", str(tmp_path / "rows.csv")]) == 2
    assert capsys.readouterr().out.startswith("bench.cuda: device 'cuda' ")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="device 'cuda' "):
        cuda.graph(lambda: None)
    assert cuda.device_count() == 0


@wheels
def test_the_hosts_share_of_a_launch_is_measured_without_a_gpu(capsys):
    from nbgrad.kernels.cuda import launch

    from bench.cuda_launch import main

    before = launch.xp
    main(number=1, repeat=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14
    assert all(float(line.split()[-2]) > 0 for line in lines)
    assert launch.xp is before


@wheels
def test_a_kernel_is_refused_by_a_device_that_is_too_old(monkeypatch):
    from nbgrad.kernels.cuda import launch, passes

    bf = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    monkeypatch.setattr(launch, "xp", SimpleNamespace(cuda=SimpleNamespace(
        Device=lambda number: SimpleNamespace(compute_capability="75"))))
    with pytest.raises(RuntimeError, match=r"^sums_bf_8_columns needs compute capability 8\.0, "
                                           r"the device has 7\.5$"):
        passes.sums(bf, bf, 8, True, "u4")._on(0)
