"""Devices, and steps that run as one: what PyTorch has under ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from nbgrad.backend import checked_device, cuda_kernels

__all__ = ["Graph", "current_device", "device", "device_count", "empty_cache", "graph",
           "is_available", "memory_allocated", "memory_reserved", "synchronize"]


def is_available() -> bool:
    """Whether there is a GPU and what it takes to use it.

    >>> from nbgrad import cuda
    >>> cuda.is_available() == (cuda.device_count() > 0)
    True
    """
    try:
        checked_device("cuda")
    except RuntimeError:
        return False
    return True


def device_count() -> int:
    """Number of GPUs; 0 where none can be used."""
    return int(cuda_kernels().memory.count()) if is_available() else 0


def current_device() -> int:
    """Number of the GPU that ops run on; their tensors must be there."""
    return int(cuda_kernels().memory.current())


def device(device: Any) -> AbstractContextManager[Any]:
    """Inside the block, ops run on another GPU: ``with device("cuda:1"):`` or ``with device(1):``.
    Raises RuntimeError where it is not there."""
    name = checked_device(f"cuda:{device}" if isinstance(device, int) else device)
    if name == "cpu":
        raise RuntimeError(f"device {device!r} is no GPU")
    context: AbstractContextManager[Any] = cuda_kernels().memory.on(
        int(name.partition(":")[2] or 0))
    return context


def synchronize() -> None:
    """Wait until the GPU has done all that it was asked for. Raises what its kernels failed with,
    RuntimeError where there is no GPU."""
    cuda_kernels().memory.synchronize()


def memory_allocated() -> int:
    """Bytes of the pool that arrays take."""
    return int(cuda_kernels().memory.used())


def memory_reserved() -> int:
    """Bytes that the pool has from the device, idle ones with them."""
    return int(cuda_kernels().memory.reserved())


def empty_cache() -> None:
    """Give the pool's idle blocks back to the device."""
    cuda_kernels().memory.empty_cache()


class Graph:
    """A step that is captured and replayed; made by ``graph``."""

    def __init__(self, step: Callable[[], Any], warmup: int) -> None:
        if not callable(step):
            raise TypeError(f"graph: expected a function without arguments, got {step!r}")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"graph: expected warmup of at least 1, got {warmup!r}")
        self._step, self._left, self._kernels = step, warmup, cuda_kernels()
        self._recording: Any = None
        self._result: Any = None

    @property
    def captured(self) -> bool:
        """Whether the next call is a replay, if no setting has changed."""
        return self._recording is not None

    def __call__(self) -> Any:
        """One step. Returns what the step returned: the same tensors at every replay."""
        if self._left:
            result = self._step()
            self._left -= 1
            return result
        if self._recording is None or not self._recording.unchanged():
            self.reset()
            memory = self._kernels.memory
            self._recording, self._result = self._kernels.graphs.capture(
                self._step, memory.xp, memory.SIMULATED)
        self._recording.replay()
        return self._result

    def reset(self) -> None:
        """Forget the captured step and its memory; the next call captures anew."""
        self._recording = self._result = None


def graph(step: Callable[[], Any], warmup: int = 3) -> Graph:
    """``step`` (forward, loss, backward, optimizer) as one launch: every call is one step.

    The first ``warmup`` calls run as they are, which compiles kernels and makes the optimizer's
    buffers; the next one captures the step in a CUDA graph, and from then on it is replayed,
    without Python and with one launch (and a small one for each dropout). As with PyTorch's
    ``torch.cuda.graph``:

    - inputs are tensors that stay: fill them with ``copy_`` before the call;
    - what it returns, and gradients, are the same memory at every replay, overwritten by the next;
    - only what runs on the device is repeated. Python code, hooks and attributes that the step
      rebinds are not, and sizes, modes (``train``/``eval``) and branches stay as captured;
    - gradients are either forgotten in the step (``zero_grad()``) or added up over steps;
    - ``Adam`` and ``AdamW`` count their steps on the device if they are made with
      ``capturable=True``, which is needed here;
    - dropout draws in each replay what an eager step would draw, and leaves its generator where
      that would: captured and eager steps may take turns, and seeds may be set between them.

    Memory comes from a pool of the graph's own, which is freed with it; a replay allocates none.
    Options of an optimizer, as the learning rate, are part of the graph, and so are the arrays of
    its state: after the one have changed, or the other were loaded, the next call captures anew. A
    schedule that moves the learning rate at every step makes each one a capture, which takes longer
    than the step itself: move it once in a while, as after an epoch.

    Raises RuntimeError that names it for what cannot be captured: ``.item()`` and other transfers,
    other random numbers than dropout's, Adam's step without ``capturable=True``, an optimizer's
    first step for a parameter, and what norms have to know of the batches before, or of a batch's
    values: averages other than ``Exponential`` (as ``momentum=None``), ``update="step"``,
    ``on_nonfinite="raise"`` (and "skip_update", but in ``BatchNorm``), masks and workers; and norms
    by statistics that are looked at on the host: ``LpBatchNorm`` but for p = 1 and inf,
    ``DecorrelatedBatchNorm`` in training, ``weight_norm`` and ``spectral_norm``. Nothing has run
    then, and eager calls go on working. Targets of ``cross_entropy`` are not checked in a captured
    step. What other threads do meanwhile is no part of it.

    >>> def train(step, batches, x, t):                     # doctest: +SKIP
    ...     step = nbgrad.cuda.graph(step)
    ...     for images, labels in batches:
    ...         x.copy_(images), t.copy_(labels)
    ...         loss = step()
    """
    return Graph(step, warmup)
