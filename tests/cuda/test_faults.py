"""What goes wrong on a device, with stand-ins for CuPy: memory, captures, grids."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from nbgrad.kernels.cuda import graphs, launch, memory
from nbgrad.kernels.cuda.intrinsics import cuda
from nbgrad.kernels.cuda.launch import KERNELS, Kernel


@pytest.fixture
def kernel():
    yield lambda body, parameters, **how: Kernel(body, parameters, name="test", **how)
    KERNELS.pop("test", None)


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
        self.cuda = SimpleNamespace(
            Stream=Stream, MemoryPool=lambda: pool, using_allocator=lambda f: nullcontext(),
            Device=lambda: SimpleNamespace(synchronize=lambda: note.append("waited")),
            get_current_stream=lambda: "current",
            runtime=SimpleNamespace(streamCaptureModeRelaxed=2))


def test_a_capture_begins_ends_and_is_launched_on_the_current_stream():
    cupy = Cupy()
    recording, result = graphs.capture(lambda: cupy.asked.append("step") or 5, cupy, False)
    recording.replay()
    assert result == 5
    assert cupy.asked == ["waited", "begin", "step", "end", "launch on current"]


def test_a_failed_capture_is_over_and_gives_its_memory_back():
    cupy = Cupy()
    with pytest.raises(RuntimeError, match=r"cuda graph: \.item\(\) cannot be part"):
        graphs.capture(lambda: graphs.refuse(".item()"), cupy, False)
    assert cupy.asked == ["waited", "begin", "end", "freed"]
    assert graphs.state.capture is None


def test_more_blocks_than_fit_16_bits(kernel):
    def body(out):
        out[cuda.blockIdx.x] = cuda.blockIdx.x
    k, out = kernel(body, "*i4", threads=1), memory.empty((70_000,), np.int32)
    k(70_000, out)
    np.testing.assert_array_equal(memory.to_host(out), np.arange(70_000))


def test_blocks_that_wait_for_each_other_must_fit_at_once(kernel, monkeypatch):
    asked = []
    k = kernel(lambda out: None, "*f4", together=True)
    monkeypatch.setattr(k, "function", lambda: SimpleNamespace(ptr=0))
    monkeypatch.setattr(k, "resident", lambda: 3)
    monkeypatch.setattr(launch, "xp", SimpleNamespace(cuda=SimpleNamespace(
        driver=SimpleNamespace(launchCooperativeKernel=lambda *a: asked.append(a[1])),
        get_current_stream=lambda: SimpleNamespace(ptr=0))))
    k._start(3, [0])
    with pytest.raises(RuntimeError, match="4 blocks wait for each other, and the device holds 3"):
        k._start(4, [0])
    assert asked == [3]
