"""Times on a device: events around a call, medians of many, inputs that no cache holds."""

import math
import statistics
from time import monotonic

__all__ = ["Clock", "nbgrad_clock", "rotating", "torch_clock"]


class Clock:
    """``event()`` makes an event with ``record()``; ``elapsed(a, b)`` is the milliseconds between
    two of them, after ``wait()``; ``now`` is the host's. At least ``least`` times are taken, or
    those that end before ``deadline``."""

    def __init__(self, event, elapsed, wait, now=monotonic, least=5, deadline=math.inf):
        self.event, self.elapsed, self.wait, self.now = event, elapsed, wait, now
        self.least, self.deadline = least, deadline

    def _goes_on(self, count, end, most):
        now = self.now()
        return now < self.deadline and (count < self.least or (count < most and now < end))

    def __call__(self, calls, seconds=0.25, most=200):
        """Median seconds of a call; ``calls`` are taken in turn, each once to warm up."""
        for f in calls:
            f()
        self.wait()
        found, end = [], self.now() + seconds
        while not found or self._goes_on(len(found), end, most):
            pairs = []
            for f in calls:                      # all are asked for before the first is waited for
                a, b = self.event(), self.event()
                a.record()
                f()
                b.record()
                pairs.append((a, b))
            self.wait()
            found += [self.elapsed(a, b) / 1e3 for a, b in pairs]
        return statistics.median(found)


def nbgrad_clock(deadline=math.inf):
    """By CuPy's events."""
    from nbgrad.kernels.cuda.memory import synchronize, xp

    return Clock(xp.cuda.Event, xp.cuda.get_elapsed_time, synchronize, deadline=deadline)


def torch_clock(torch, deadline=math.inf):
    """By PyTorch's."""
    return Clock(lambda: torch.cuda.Event(enable_timing=True), lambda a, b: a.elapsed_time(b),
                 torch.cuda.synchronize, deadline=deadline)


def rotating(nbytes, cache, most=8):
    """How many sets of so many bytes exceed the cache twice: what a call reads was not left there
    by the one before."""
    return max(1, min(most, -(-2 * cache // max(1, nbytes)) + 1))
