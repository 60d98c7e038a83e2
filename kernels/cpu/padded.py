"""Rows of pixels copied with their padding, between pointers."""

from .jit import device
from .simd import after, fill, lanes, load, load_part, pointer, store, store_part
from .tasks import share, tasks

__all__ = ["clear", "copy", "padded", "zeros"]

CLEARED = 1 << 16          # values of a task


@device
def zeros(y, at, n):
    """y[at], … = 0, n of them."""
    L, zero = lanes(y), fill(y, 0)
    whole = at + n // L * L
    for i in range(at, whole, L):
        store(y, i, zero)
    store_part(y, whole, zero, n % L)


@device
def _clear_task(t, y):
    first = t * CLEARED
    zeros(after(pointer(y), first), 0, min(CLEARED, y.size - first))


@tasks
def _clear(run, y):
    share(_clear_task, -(-y.size // CLEARED), run, (y,))


def clear(y):
    """y = 0, by all threads: of 6 MB, NumPy's one takes longer than the products of a strided 1×1
    convolution's gradient."""
    _clear(y.reshape(-1), work=y.nbytes)


@device
def copy(x, at, n, y, to):
    """y[to], … = x[at], …, n of them."""
    L = lanes(x)
    whole = n // L * L
    for i in range(0, whole, L):
        store(y, to + i, load(x, at + i))
    if whole < n:
        store_part(y, to + whole, load_part(x, at + whole, n - whole), n - whole)


@device
def padded(x, at, row, pixel, H, W, top, left, rows, width, n, y, to, step):
    """Rows top … and columns left … of an image (H, W) of x, n values of each pixel, to y (rows,
    width, step); zeros for pixels outside, anything behind n."""
    first = max(0, min(width, -left))
    last = max(first, min(width, W - left))
    runs, run = (1, (last - first) * n) if pixel == n == step else (last - first, n)
    for r in range(rows):
        h, line = top + r, to + r * width * step
        if h < 0 or h >= H:
            zeros(y, line, width * step)
        else:
            zeros(y, line, first * step)
            for i in range(runs):
                copy(x, at + h * row + (left + first + i) * pixel, run, y,
                     line + (first + i) * step)
            zeros(y, line + last * step, (width - last) * step)
