"""What goes wrong on a device, with stand-ins for CuPy: memory, captures, grids."""

import ctypes
import gc
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from nbgrad.kernels.cuda import graphs, indices, launch, memory, moments, single
from nbgrad.kernels.cuda.intrinsics import cuda
from nbgrad.kernels.cuda.launch import KERNELS, Kernel

import nbgrad
from nbgrad import optim


@pytest.fixture
def kernel():
    yield lambda body, parameters, **how: Kernel(body, parameters, name="test", **how)
    KERNELS.pop("test", None)


INDICES = {"whole": 2, "array": np.array([0, -2]), "list": [1, 5], "rows": (slice(None), [3]),
           "behind": (..., None, np.array([[2, 4]])), "both": (np.array([1, 1]), np.array([0, -4])),
           "mask": (np.array([True, False]), np.array([3]))}
RIGHT = {"array": np.array([0, -2]), "both": (np.array([1, -1]), np.array([2, -3])), "mask": (
    np.array([[True, False, True], [False] * 3]),), "nothing": np.zeros(0, np.int64),
    "wide": (None, np.array([1], np.uint8), ..., np.array([2]))}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("where", ["host", "device", "debug"])
def test_indices_out_of_range(name, where, monkeypatch):
    """Of arrays on the device in debug mode only: CuPy would have wrapped them around. With NumPy's
    own arrays the check says what NumPy says."""
    index, x = INDICES[name], np.zeros((2, 3), np.float32)
    parts = index if isinstance(index, tuple) else (index,)
    if name == "array":
        x = x[:1]
    monkeypatch.setattr(launch, "debug", where == "debug")
    with pytest.raises(IndexError) as says:
        x[index]
    if where != "host":
        parts = tuple(memory.to_device(np.asarray(p)) if isinstance(p, np.ndarray | list) else p
                      for p in parts)
    index = parts if isinstance(index, tuple) else parts[0]
    if name == "whole" or where == "device":
        indices.check(x.shape, index)                          # CuPy itself, or nobody
    else:
        with pytest.raises(IndexError, match=f"^{re.escape(str(says.value))}$"):
            indices.check(x.shape, index)


@pytest.mark.parametrize("name", RIGHT)
def test_indices_in_range(name, monkeypatch):
    monkeypatch.setattr(launch, "debug", True)
    x = np.arange(6.0).reshape(2, 3)
    x[RIGHT[name]]
    indices.check(x.shape, RIGHT[name])


def test_every_way_to_index_is_checked(monkeypatch):
    """Reading, its gradient's writing, and writing with and without a gradient."""
    seen, check = [], indices.check
    monkeypatch.setattr(indices, "check", lambda shape, index: seen.append(check(shape, index)))
    x = nbgrad.ones(3, device="cuda", requires_grad=True)
    x[nbgrad.tensor([0, 2], device="cuda")].sum().backward()
    y = x * 1
    y[[0, 1]] = 5.0
    y.detach()[[2]] = 7.0
    assert y.tolist() == [5.0, 5.0, 7.0]
    assert len(seen) == 3
    for write in (lambda: y[[3]], lambda: y.__setitem__([3], 1.0), lambda: y.index_select(0, [-4])):
        with pytest.raises(IndexError, match=r"index (3|-4) is out of bounds for axis 0"):
            write()


class OutOfMemoryError(Exception):
    """CuPy's."""


@pytest.mark.parametrize("room", [True, False])
def test_out_of_memory_frees_idle_blocks_then_says_sizes(room, monkeypatch):
    freed = []

    def empty(shape, dtype):
        if room and freed:
            return "array"
        raise OutOfMemoryError("no room")
    pool = SimpleNamespace(free_all_blocks=lambda: freed.append(1))
    stand_in = SimpleNamespace(
        empty=empty, get_default_memory_pool=lambda: pool,
        get_default_pinned_memory_pool=lambda: pool,
        cuda=SimpleNamespace(memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
                             Device=lambda: SimpleNamespace(mem_info=(100, 2000))))
    monkeypatch.setattr(memory, "xp", stand_in)
    monkeypatch.setattr(memory, "SIMULATED", False)
    if room:
        assert memory.empty((3, 4), "f4") == "array"
    else:
        with pytest.raises(MemoryError, match=r"48 bytes for shape \(3, 4\) of float32, 100 of "
                                              r"2,000 free"):
            memory.empty((3, 4), "f4")
    assert freed


class Cycle:
    """What the garbage collector alone frees."""

    def __init__(self):
        self.me = self


def test_out_of_memory_frees_what_nobody_reaches(monkeypatch):
    """Cycles, and arrays that were kept for copies which are done."""
    gone = weakref.ref(Cycle())
    copied = weakref.ref(done := Cycle())
    done.me = None
    flying = [(SimpleNamespace(done=True), done), (SimpleNamespace(done=False), "still copied")]
    del done

    def empty(shape, dtype):
        if gone() is None and copied() is None:
            return "array"
        raise OutOfMemoryError("no room")
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    monkeypatch.setattr(memory, "_flying", flying)
    monkeypatch.setattr(memory, "SIMULATED", False)
    monkeypatch.setattr(memory, "xp", SimpleNamespace(
        empty=empty, get_default_memory_pool=lambda: pool, get_default_pinned_memory_pool=lambda:
        pool, cuda=SimpleNamespace(memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError))))
    gc.disable()
    try:
        assert memory.empty((3,), "f4") == "array"
    finally:
        gc.enable()
    assert [kept for _, kept in flying] == ["still copied"]


class Cupy:
    """Notes what a capture asks of CuPy."""

    def __init__(self):
        self.asked = note = []

        class Stream(nullcontext):
            def __init__(self, non_blocking):
                super().__init__()

            def begin_capture(self, mode):
                note.append("begin")

            def end_capture(self):
                note.append("end")
                return SimpleNamespace(launch=lambda stream: note.append(f"launch on {stream}"))
        pool = SimpleNamespace(free_all_blocks=lambda: note.append("freed"))
        self.allocator = "the graph's"
        self.get_default_memory_pool = lambda: SimpleNamespace(malloc="the default pool's")

        @contextmanager
        def using_allocator(f):
            before, self.allocator = self.allocator, f
            yield
            self.allocator = before
        self.cuda = SimpleNamespace(
            Stream=Stream, MemoryPool=lambda: pool, using_allocator=using_allocator,
            Device=lambda: SimpleNamespace(synchronize=lambda: note.append("waited")),
            get_current_stream=lambda: "current",
            runtime=SimpleNamespace(streamCaptureModeRelaxed=2))


def test_a_capture_begins_ends_and_is_launched_on_the_current_stream():
    cupy = Cupy()
    recording, result = graphs.capture(lambda: cupy.asked.append("step") or 5, cupy, False)
    recording.replay()
    assert result == 5
    assert cupy.asked == ["waited", "begin", "step", "end", "launch on current"]


def test_what_is_sent_ahead_has_memory_that_no_kernel_of_the_graph_writes():
    """The pool of the graph would give memory that an earlier kernel of it has used."""
    cupy = Cupy()

    def step():
        assert cupy.allocator.__func__ is graphs.Captured.malloc
        graphs.ahead(lambda: cupy.allocator, lambda array: cupy.asked.append(f"sent to {array}"))
        assert cupy.allocator.__func__ is graphs.Captured.malloc
    recording, _ = graphs.capture(step, cupy, False)
    assert cupy.asked == ["waited", "begin", "end"]
    for _ in range(2):
        recording.replay()
    assert cupy.asked[3:] == ["sent to the default pool's", "launch on current"] * 2


def test_a_failed_capture_is_over_and_gives_its_memory_back():
    cupy = Cupy()
    with pytest.raises(RuntimeError, match=r"cuda graph: \.item\(\) cannot be part"):
        graphs.capture(lambda: graphs.refuse(".item()"), cupy, False)
    assert cupy.asked == ["waited", "begin", "end", "freed"]
    assert graphs.state.capture is None


def test_a_capture_that_cuda_refuses_at_the_end_is_over(monkeypatch):
    cupy = Cupy()

    def end_capture(self):
        cupy.asked.append("refused")
        raise RuntimeError("operation failed due to a previous error during capture")
    monkeypatch.setattr(cupy.cuda.Stream, "end_capture", end_capture)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.capture(lambda: 5, cupy, False)
    assert cupy.asked == ["waited", "begin", "refused", "refused", "freed"]
    assert graphs.state.capture is None


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt(), ValueError("own")],
                         ids=lambda e: type(e).__name__)
def test_a_failed_capture_leaves_eager_and_later_captures_usable(error):
    """The weight is what so many steps of gradient descent give, whichever way they ran."""
    w, faults = nbgrad.tensor([8.0], device="cuda", requires_grad=True), [error]
    optimizer = optim.SGD([w], 0.25)

    def step():
        optimizer.zero_grad()
        (w * w).sum().backward()                               # w ← w − 0.25 · 2 w
        if graphs.state.capture is not None and faults:
            raise faults.pop()
        optimizer.step()
        return w
    run = nbgrad.cuda.graph(step, warmup=1)
    run()
    with pytest.raises(type(error)):
        run()
    assert graphs.state.capture is None
    assert w.item() == 4                                       # nothing has run
    step()
    assert w.item() == 2
    run()
    run()
    assert run.captured
    assert w.item() == 0.5


def test_more_blocks_than_fit_16_bits(kernel):
    def body(out):
        out[cuda.blockIdx.x] = cuda.blockIdx.x
    k, out = kernel(body, "*i4", threads=1), memory.empty((70_000,), np.int32)
    k(70_000, out)
    np.testing.assert_array_equal(memory.to_host(out), np.arange(70_000))


class Driver:
    """A device whose 2 multiprocessors hold 2 blocks each of a kernel, and notes what is asked."""

    def __init__(self, monkeypatch):
        self.asked, self.number, self.fault = [], 0, None
        cuda = SimpleNamespace(
            driver=self, function=SimpleNamespace(Module=lambda: self),
            get_current_stream=lambda: SimpleNamespace(ptr=0),
            runtime=SimpleNamespace(getDevice=lambda: self.number),
            Device=lambda number=0: SimpleNamespace(
                compute_capability="90", attributes={"MultiProcessorCount": 2},
                synchronize=self.wait))
        for module in (launch, memory):
            monkeypatch.setattr(module, "xp", SimpleNamespace(cuda=cuda))
            monkeypatch.setattr(module, "SIMULATED", False)
        monkeypatch.setattr(launch, "Array", OnDevice)
        monkeypatch.setattr(Kernel, "machine_code", lambda self, cc: b"")
        launch._processors.cache_clear()

    def load(self, code):
        self.asked.append("loaded")

    def get_function(self, name):
        return SimpleNamespace(ptr=77)

    def occupancyMaxActiveBlocksPerMultiprocessor(self, f, threads, shared):
        return 2

    def launchKernel(self, f, blocks, *rest):
        values = (ctypes.c_void_p * 2).from_address(rest[-2])
        self.asked.append((blocks, ctypes.c_int64.from_address(values[0]).value,
                           ctypes.c_int32.from_address(values[1]).value))

    def launchCooperativeKernel(self, f, blocks, *rest):
        self.asked.append(f"{blocks} together")

    def wait(self):
        self.asked.append("waited")
        if self.fault:
            raise RuntimeError(self.fault)


class OnDevice:
    """What a launch reads of CuPy's arrays."""

    def __init__(self, x, device=0):
        self.shape, self.strides = x.shape, x.strides
        self.dtype, self.itemsize = x.dtype, x.itemsize
        self._c_contiguous = x.flags.c_contiguous
        self.data = SimpleNamespace(ptr=x.ctypes.data, device_id=device)


@pytest.fixture
def driver(monkeypatch):
    yield Driver(monkeypatch)
    launch._processors.cache_clear()


def test_a_launch_loads_once_and_packs_addresses_and_numbers(kernel, driver):
    k, x = kernel(lambda x, n: None, "*f4 i4"), np.zeros(6, np.float32)
    k(2, OnDevice(x), 5)
    k(3, None, -1)
    k(0, None, 7)                                            # nothing to do
    assert driver.asked == ["loaded", (2, x.ctypes.data, 5), (3, 0, -1)]
    driver.number = 1
    k(4, OnDevice(x, 1), 6)
    assert driver.asked[3:] == ["loaded", (4, x.ctypes.data, 6)]


F4 = np.zeros((4, 6), np.float32)
WRONG = {"NumPy's": (F4, TypeError, "expected an array on the device, got ndarray"),
         "number": (3, TypeError, "expected an array on the device, got int"),
         "dtype": (OnDevice(F4.astype("f8")), TypeError, "expected an array of f4, got float64"),
         "device": (OnDevice(F4, 1), RuntimeError, "the array is on device 1, the kernel on 0"),
         "gaps": (OnDevice(F4[:, ::2]), ValueError, r"expected memory without gaps.*\(24, 8\)"),
         "broadcast": (OnDevice(np.broadcast_to(F4[0], (4, 6))), ValueError, r"strides \(0, 4\)")}


@pytest.mark.parametrize("seen", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_array_raises_before_the_launch(what, seen, kernel, driver):
    k, (a, error, says) = kernel(lambda x, n: None, "*f4 i4"), WRONG[what]
    if seen:
        k(1, OnDevice(F4), 0)
        driver.asked.clear()
    with pytest.raises(error, match=f"test: parameter 1: .*{says}"):
        k(1, a, 0)
    assert driver.asked == []
    k(1, OnDevice(F4), 0)                                    # and works as before
    assert driver.asked[-1][0] == 1


def test_what_needs_no_order_takes_any_dense_memory(kernel, driver):
    k = kernel(lambda x, n: None, "*f4 i4")
    for x in (F4.T, F4.reshape(2, 2, 6).transpose(2, 0, 1), F4[:, :1].T[:, :1], F4[:0, ::2]):
        k(1, OnDevice(x), 0)
    assert len(driver.asked) == 5


def test_kernels_that_walk_strides_take_gaps(kernel, driver):
    kernel(lambda x, n: None, "*f4 i4", strided=True)(1, OnDevice(F4[::2, ::2]), 0)
    assert driver.asked[-1][0] == 1


@pytest.mark.parametrize("numbers", [("3",), (2.5,), (1 << 40,), (None,)])
def test_wrong_numbers_raise_before_the_launch(numbers, kernel, driver):
    k = kernel(lambda x, n: None, "*f4 i4")
    with pytest.raises(TypeError, match=r"test: parameters \*f4 i4, got "):
        k(1, OnDevice(F4), *numbers)
    with pytest.raises(TypeError, match="test: 2 parameters, got 1"):
        k(1, OnDevice(F4))
    assert not any(isinstance(a, tuple) for a in driver.asked)


def test_the_simulator_refuses_what_a_device_refuses(kernel):
    k = kernel(lambda x, n: None, "*f4 i4")
    x = memory.to_device(F4)
    for a, n, error in ((F4, 0, TypeError), (x.astype("f8"), 0, TypeError),
                        (x[:, ::2], 0, ValueError), (x, 2.5, TypeError)):
        with pytest.raises(error, match="test: parameter"):
            k(1, a, n)
    k(1, x, 0)


@pytest.mark.parametrize(("stream", "shared"), [(0, True), (77, True), (2, False)])
def test_kernels_that_may_run_at_the_same_time_count_apart(stream, shared, monkeypatch):
    """Where each thread has a default stream of its own (2), threads would free each other's
    blocks, or wait forever."""
    made = SimpleNamespace(zeros=lambda n, dtype: np.zeros(n, dtype), cuda=SimpleNamespace(
        get_current_stream=lambda: SimpleNamespace(ptr=stream),
        runtime=SimpleNamespace(getDevice=lambda: 0)))
    for module in (memory, moments, single):
        monkeypatch.setattr(module, "xp", made)
        monkeypatch.setattr(module, "SIMULATED", False)
    for cached in (moments._tickets, single._counters):
        monkeypatch.setattr(sys.modules[cached.__module__], cached.__name__,
                            cache(cached.__wrapped__))
    here = moments.tickets(), single.two_per_tile(3)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: (moments.tickets(), single.two_per_tile(3))).result()
    assert [a is b for a, b in zip(here, there)] == [shared] * 2
    assert moments.tickets() is here[0]


def test_blocks_that_wait_for_each_other_must_fit_at_once(kernel, driver):
    k = kernel(lambda out: None, "*f4", together=True)
    assert k.resident() == 4
    k(4, None)
    with pytest.raises(RuntimeError, match="5 blocks wait for each other, and the device holds 4"):
        k(5, None)
    assert driver.asked == ["loaded", "4 together"]


@pytest.mark.parametrize("debug", [False, True])
def test_debug_mode_looks_for_errors_after_each_launch(debug, kernel, driver, monkeypatch):
    monkeypatch.setattr(launch, "debug", debug)
    k, driver.fault = kernel(lambda x, n: None, "*f4 i4"), "an illegal memory access"
    if debug:
        with pytest.raises(RuntimeError, match="test failed on 9 blocks: an illegal memory access"):
            k(9, None, 0)
    else:
        k(9, None, 0)
        with pytest.raises(RuntimeError, match=r"^an illegal memory access"):
            memory.synchronize()
    assert driver.asked == ["loaded", (9, 0, 0), "waited"]
