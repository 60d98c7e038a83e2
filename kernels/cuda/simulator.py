"""A block of a GPU in Python: its threads run one at a time, each until it waits for the others.

Numba's own simulator has neither warps nor shuffles; here kernels run as they are written, with
``cuda`` below in place of ``numba.cuda``. The order is fixed, so what a missing barrier spoils is
spoiled in every run, and ``order`` reverses it. A read or write outside an array, a vector load off
its alignment and a barrier that some threads never reach raise; memory starts as NaN.
"""

from types import CodeType, FunctionType, SimpleNamespace

import numpy as np

from ..half import is_half
from ..quiet import quiet

__all__ = ["Pointer", "arrived", "committed", "cuda", "fresh", "later", "run"]

WARP = 32
order = 1                    # -1: threads run from the last to the first
_running = SimpleNamespace(thread=None)


def fresh(shape, dtype):
    """Memory whose every value shows where it is used unwritten."""
    out = np.empty(shape, dtype)
    out.fill({"f": np.nan, "V": np.nan, "i": -1}.get(out.dtype.kind, 1))
    return out


class Pointer:
    """An address inside an array's memory, as kernels get it. Halves are read as float32, and
    rounded when they are written."""

    def __init__(self, array, origin=0):
        self.memory, self.origin, self.size = array, origin, array.size
        self.address, self.step = array.ctypes.data, array.itemsize   # once: it takes 2 us
        self.half = is_half(array.dtype)

    @classmethod
    def of(cls, x):
        """To the first element of x, over all that its strides reach."""
        if x is None or not x.size:
            return cls(np.empty(0, np.float32 if x is None else x.dtype))
        steps = [s // x.itemsize * (n - 1) for s, n in zip(x.strides, x.shape)]
        low = -sum(s for s in steps if s < 0)
        first = x[(*(slice(None, None, -1 if s < 0 else 1) for s in steps), ...)]
        extent = low + sum(s for s in steps if s > 0) + 1
        whole = np.lib.stride_tricks.as_strided(first.view(np.ndarray), (extent,), (x.itemsize,))
        return cls(whole, low)

    def at(self, i, n=1):
        """Where element i lies in the memory; n of them must be there, on an address for n."""
        i = self.origin + int(i)
        if not 0 <= i <= self.size - n:
            raise IndexError(f"{n} elements at {i - self.origin}: there are "
                             f"{self.size - self.origin}")
        if (self.address + i * self.step) % (n * self.step):
            raise ValueError(f"{n} elements at {i - self.origin}: not aligned")
        return i

    def __getitem__(self, i):
        value = self.memory[self.at(i)]
        return np.float32(value) if self.half else value

    def __setitem__(self, i, value):
        self.memory[self.at(i)] = value


class _Group:
    """Threads that wait for each other: a block, a warp, all blocks."""

    def __init__(self):
        self.live, self.waiting, self.slots = 0, [], ({}, {})

    def open(self):
        if self.waiting and len(self.waiting) == self.live:
            for t in self.waiting:
                t.waits = None
            self.waiting = []


class _Thread:
    """One CUDA thread."""

    waits = None

    def __init__(self, number, threads, block, blocks, memory, groups):
        self.number, self.threads, self.block, self.blocks = number, threads, block, blocks
        self.memory, self.groups = memory, groups      # static and dynamic shared memory
        self.made = self.exchanges = 0
        self.copies = [[]]                 # groups of copies to shared memory, the last one open
        for group in groups.values():
            group.live += 1

    def wait(self, name):
        group = self.groups[name]
        group.waiting.append(self)
        self.waits = name
        group.open()
        if self.waits is not None:
            self.turn.parent.switch()

    def run(self, body, args):
        body(*args)
        for group in self.groups.values():
            group.live -= 1
            group.open()


def _joins(function, seen):
    """Whether a function, or one that it calls, lets threads wait for each other."""
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    names, stack = set(), [function.__code__]
    while stack:
        code = stack.pop()
        names |= set(code.co_names)
        stack += [c for c in code.co_consts if isinstance(c, CodeType)]
    if names & _JOINING:
        return True
    called = [function.__globals__.get(n) for n in names]
    called += [cell.cell_contents for cell in function.__closure__ or ()]
    return any(_joins(f, seen) for f in called)


def run(body, blocks, threads, args, shared=0, together=False):
    """Run a kernel: block after block, or all blocks at once."""
    alone = not _joins(body, set())
    body = quiet(body)
    everyone = _Group()
    for group in ([range(blocks)] if together else [[b] for b in range(blocks)]):
        members = []
        for b in group:
            memory = {"dynamic": fresh(shared, np.uint8), "static": []}
            block, warps = _Group(), [_Group() for _ in range(-(-threads // WARP))]
            members += [_Thread(t, threads, b, blocks, memory,
                                {"block": block, "warp": warps[t // WARP], "grid": everyone})
                        for t in range(threads)]
        if alone:
            for t in members[::order]:
                _running.thread = t
                body(*args)
        else:
            _take_turns(members[::order], body, args)


def _take_turns(members, body, args):
    from greenlet import greenlet  # a thread of Python's takes 20 times as long to change to

    for t in members:
        t.turn = greenlet(t.run)
    left = members
    while left:
        ready = [t for t in left if t.waits is None]
        if not ready:
            where = {name: [t.number for t in left if t.waits == name]
                     for name in {t.waits for t in left}}
            raise RuntimeError(f"threads wait for each other for ever: {where}")
        for t in ready:
            _running.thread = t
            try:
                t.turn.switch(*(() if t.turn else (body, args)))
            except Exception as e:
                e.add_note(f"in thread {t.number} of block {t.block}")
                raise
        left = [t for t in left if not t.turn.dead]


class _Index:
    def __init__(self, name):
        self.name = name

    @property
    def x(self):
        return getattr(_running.thread, self.name)

    y = z = 0


def _exchange(value, source, width=WARP):
    """What the lane ``source`` of this warp gives."""
    t = _running.thread
    slots = t.groups["warp"].slots[t.exchanges % 2]
    slots[t.number % WARP] = value
    t.exchanges += 1
    t.wait("warp")
    return slots.get(source, value) if source is not None else slots


def _lane():
    return _running.thread.number % WARP


def _shared_array(shape, dtype):
    t = _running.thread
    dtype = _dtype(dtype)
    if shape == 0:
        memory = t.memory["dynamic"]
        return memory[:memory.size // dtype.itemsize * dtype.itemsize].view(dtype)
    if t.made == len(t.memory["static"]):
        t.memory["static"].append(fresh(shape, dtype))
    t.made += 1
    return t.memory["static"][t.made - 1]


def _dtype(kind):
    from numba.np.numpy_support import as_dtype

    return np.dtype(kind) if isinstance(kind, (type, np.dtype)) else as_dtype(kind)


def _syncthreads():
    _running.thread.wait("block")


def _ballot(mask, predicate):
    return sum(1 << lane for lane, p in _exchange(bool(predicate), None).items() if p)


def _atomic_add(array, i, value):
    old = array[i]
    array[i] = old + value
    return old


def later(move):
    """A copy that may happen from now until it is waited for: at once, or (with ``order``) as late
    as can be."""
    move() if order == 1 else _running.thread.copies[-1].append(move)


def committed():
    _running.thread.copies.append([])


def arrived(n):
    """All but the last n groups of copies have happened."""
    copies = _running.thread.copies
    while len(copies) > n + 1:
        for move in copies.pop(0):
            move()


_JOINING = {"syncthreads", "syncwarp", "shfl_sync", "shfl_xor_sync", "shfl_down_sync",
            "ballot_sync", "grid_sync", "exchange", "pause"}
exchange = _exchange


def pause():
    """Let the others run: for who waits for what they write."""
    _running.thread.turn.parent.switch()


cuda = SimpleNamespace(
    threadIdx=_Index("number"), blockIdx=_Index("block"), blockDim=_Index("threads"),
    gridDim=_Index("blocks"), syncthreads=_syncthreads,
    syncwarp=lambda mask=None: _running.thread.wait("warp"),
    shfl_sync=lambda mask, value, lane: _exchange(value, lane % WARP),
    shfl_xor_sync=lambda mask, value, flip: _exchange(value, _lane() ^ flip),
    shfl_down_sync=lambda mask, value, by: _exchange(value, _lane() + by),
    ballot_sync=_ballot, threadfence=lambda: None, threadfence_block=lambda: None,
    grid_sync=lambda: _running.thread.wait("grid"),
    shared=SimpleNamespace(array=_shared_array),
    local=SimpleNamespace(array=lambda shape, dtype: fresh(shape, _dtype(dtype))),
    atomic=SimpleNamespace(add=_atomic_add))
