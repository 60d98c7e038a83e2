"""Times on a device: events around a call, medians of many, inputs that no cache holds."""

import statistics
from time import monotonic

__all__ = ["Clock", "nbgrad_clock", "rotating", "torch_clock"]


class Clock:
    """``event()`` makes an event with ``record()``; ``elapsed(a, b)`` is the milliseconds between
    two of them, after ``wait()``; ``now`` is the host's. At least ``least`` times are taken."""

    def __init__(self, event, elapsed, wait, now=monotonic, least=5):
        self.event, self.elapsed, self.wait, self.now = event, elapsed, wait, now
        self.least = least

    def __call__(self, calls, seconds=0.25, most=200):
        """Median seconds of a call; ``calls`` are taken in turn, each once to warm up."""
        for f in calls:
            f()
        self.wait()
        found, end = [], self.now() + seconds
        while len(found) < self.least or (len(found) < most and self.now() < end):
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


def nbgrad_clock():
    """By CuPy's events."""
    from nbgrad.kernels.cuda.memory import synchronize, xp

    return Clock(xp.cuda.Event, xp.cuda.get_elapsed_time, synchronize)


def torch_clock(torch):
    """By PyTorch's."""
    return Clock(lambda: torch.cuda.Event(enable_timing=True), lambda a, b: a.elapsed_time(b),
                 torch.cuda.synchronize)


def rotating(nbytes, cache, most=8):
    """How many sets of so many bytes exceed the cache twice: what a call reads was not left there
    by the one before."""
    return max(1, min(most, -(-2 * cache // max(1, nbytes)) + 1))
