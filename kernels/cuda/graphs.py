"""A step of many launches as one: recorded once, played again without Python.

On a device CUDA captures what is asked of a stream. A graph holds addresses, so what the step
allocates comes from a pool that lives as long as the graph, and what it reads from elsewhere
(constants, say) is kept alive. In the simulator what would run on the device is put on a list:
launches, and NumPy's functions of device arrays, which stand for CuPy's kernels. There as here,
capturing computes nothing. What the host finds anew for each step, such as where its generator
stands, is sent ahead of each replay.
"""

from contextlib import nullcontext, suppress
from functools import partial
from threading import local

import numpy as np

__all__ = ["Captured", "ahead", "capture", "refuse", "state", "watch"]


class State(local):
    """Of each thread its own: others go on eagerly while one captures."""

    capture = None           # the Recording that is being made


state = State()


class Recording:
    """What both kinds of recordings have: settings of the host that are part of it, and what the
    host does ahead of each replay."""

    def __init__(self):
        self.watched, self.cells, self.ahead = [], {}, []

    def replay(self):
        refuse("a replay of another step")
        for prepare in self.ahead:
            prepare()
        self._play()

    def unchanged(self):
        """Whether the host's settings are those that were recorded."""
        return all(get() == value for get, value in self.watched)


def watch(get):
    """While a step is recorded: ``get()`` is part of it; when it changes, record anew."""
    if state.capture is not None:
        state.capture.watched.append((get, get()))


def ahead(make, prepare):
    """While a step is recorded: make(), an array that ``prepare`` fills ahead of each replay. It
    shares no memory with what the step itself makes, which might be written in between."""
    found = state.capture
    with found.outside():
        array = make()
    found.ahead.append(partial(prepare, array))
    return array


def refuse(what):
    """Raise RuntimeError if a step is being recorded, of which ``what`` cannot be a part."""
    if state.capture is not None:
        raise RuntimeError(f"cuda graph: {what} cannot be part of a captured step")


# ----------------------------------------------------------------------------------- the simulator

class Listed(Recording):
    """The simulator's: functions to call again, in order."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def launch(self, call):
        self.calls.append(call)

    def hold(self, args):
        """Nothing: the calls hold their arrays."""

    def outside(self):
        return nullcontext()

    def result(self, call, inputs):
        """call()'s arrays now, for their shapes; at every replay their values, unless they are
        views of an input."""
        state.capture = None
        try:
            with np.errstate(all="ignore"):
                y = call()
        finally:
            state.capture = self
        parts = y if isinstance(y, (tuple, list)) else [y]
        if not all(isinstance(a, (np.ndarray, np.generic)) for a in parts):
            return y                                 # a dtype, a shape
        made = [np.asarray(a) for a in parts]
        if not any(np.may_share_memory(a, b) for a in made for b in inputs):
            self.calls.append(partial(_again, call, made))
        return type(y)(made) if parts is y else made[0]

    def record(self, step):
        state.capture = self
        try:
            return step()
        finally:
            state.capture = None

    def _play(self):
        with np.errstate(all="ignore"):
            for call in self.calls:
                call()


def _again(call, made):
    y = call()
    for to, a in zip(made, y if isinstance(y, (tuple, list)) else [y]):
        np.copyto(to, a)


# ----------------------------------------------------------------------------------------- devices

class Captured(Recording):
    """CUDA's graph of what a stream was asked for, its pool, and what else it reads."""

    def __init__(self, xp):
        super().__init__()
        self.xp, self.held, self.own, self.graph = xp, {}, set(), None
        self.stream, self.pool = xp.cuda.Stream(non_blocking=True), xp.cuda.MemoryPool()

    def malloc(self, size):
        """Of the graph's own pool."""
        memory = self.pool.malloc(size)
        self.own.add(memory.mem.ptr)
        return memory

    def outside(self):
        """In here, memory does not come from the graph's pool."""
        return self.xp.cuda.using_allocator(self.xp.get_default_memory_pool().malloc)

    def hold(self, args):
        """Keep alive what a launch is given from outside of the pool."""
        for a in args:
            mem = getattr(getattr(a, "data", None), "mem", None)
            if mem is not None and mem.ptr not in self.own:
                self.held[mem.ptr] = mem

    def record(self, step):
        """step(), captured. Whatever it raises, the capture is over and the pool is empty after."""
        cuda = self.xp.cuda
        cuda.Device().synchronize()
        with self.stream, cuda.using_allocator(self.malloc):
            # "relaxed" lets the pool grow meanwhile; the transfers it would let pass are refused
            self.stream.begin_capture(cuda.runtime.streamCaptureModeRelaxed)
            state.capture = self
            try:
                result = step()
                state.capture = None
                self.graph = self.stream.end_capture()
                return result
            except BaseException:
                state.capture = None
                self._abandon()
                raise

    def _abandon(self):
        with suppress(Exception):    # CUDA says that it was invalid: it is over all the same
            self.stream.end_capture()
        self.held.clear()
        self.pool.free_all_blocks()

    def _play(self):
        self.graph.launch(stream=self.xp.cuda.get_current_stream())


def own(make, *key):
    """make(*key), a cached function that allocates; while a step is captured, one of the capture's
    own: if it fails, what the function has asked for is never done."""
    found = state.capture
    if found is None:
        return make(*key)
    if (make, *key) not in found.cells:
        found.cells[make, *key] = make.__wrapped__(*key)
    return found.cells[make, *key]


def capture(step, xp, simulated):
    """A Recording of step(), and what step returned. Raises what step raises, and RuntimeError
    inside of another capture."""
    refuse("another capture")
    recording = Listed() if simulated else Captured(xp)
    return recording, recording.record(step)
