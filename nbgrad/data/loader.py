"""Batches in a seeded order, from which training can resume in the middle of an epoch."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from nbgrad.backend import checked_device
from nbgrad.data.collate import default_collate, pinned
from nbgrad.data.dataset import Dataset, gather
from nbgrad.data.prefetch import Prefetch
from nbgrad.ops import random

_Rows = npt.NDArray[np.int64]


class DataLoader:
    """Iterates over batches of a dataset; every `iter(loader)` is one epoch.

    With `shuffle`, each epoch draws one permutation from `generator` (default:
    nbgrad.default_generator) when it starts: the order depends on the generator's state alone,
    never on `num_workers`. `sampler` gives the order instead: it is iterated once per epoch.

    `num_workers` counts threads (the copying is NumPy's, which runs outside the GIL), each with at
    most `prefetch` batches ready or being made. Batches and their order are those of
    `num_workers=0`. What a thread raises is raised in the loop, at the batch that failed. Threads
    are for samples that are read or computed: the hand-over costs about 30 µs a batch, as much as
    gathering 64 MNIST images from a TensorDataset does.

    Without `collate_fn`, rows of a TensorDataset (or Subsets of one) are gathered with one indexing
    per tensor; other samples go through `default_collate`. A batch of tuples is a list, as in
    PyTorch. Keywords after `shuffle` are keyword-only.

    With `pin_memory`, batches are put into memory that a GPU copies from while the host goes on
    (`x.to("cuda", non_blocking=True)`), by the worker threads if there are any. Where there is no
    GPU it warns, with what is missing, and does nothing.

    Raises:
        ValueError: batch_size, num_workers or prefetch out of range, `sampler` with `shuffle`.
        TypeError: a dataset without a length or without samples by index.

    >>> import numpy as np
    >>> from nbgrad.data import TensorDataset
    >>> loader = DataLoader(TensorDataset(np.arange(5)), batch_size=2)
    >>> [batch.tolist() for (batch,) in loader]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        sampler: Iterable[int] | None = None,
        drop_last: bool = False,
        generator: random.Generator | None = None,
        collate_fn: Callable[[Sequence[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            kind = type(dataset).__name__
            raise TypeError(f"DataLoader: dataset needs __len__ and __getitem__, got {kind}")
        if sampler is not None and shuffle:
            raise ValueError("DataLoader: sampler option is mutually exclusive with shuffle")
        self.dataset = dataset
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.shuffle = bool(shuffle)
        self.sampler = sampler
        self.drop_last = bool(drop_last)
        self.generator = generator
        self.collate_fn = collate_fn
        self.num_workers = _at_least(0, "num_workers", num_workers)
        self.prefetch = _at_least(1, "prefetch", prefetch)
        self.pin_memory = bool(pin_memory)
        self._epoch = self._position = 0
        self._start: dict[str, Any] | None = None  # the generator's state that gave this order
        self._checksum = 0  # of this order
        self._resume = False
        self._run: object = None  # the iterator whose position counts

    def __len__(self) -> int:
        """Batches per epoch."""
        # a sampler may give more or fewer samples than the dataset has
        return self._count(len(self.dataset if self.sampler is None else self.sampler))  # type: ignore[arg-type]

    def _count(self, samples: int) -> int:
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        self._run = run = object()
        if self._resume:
            order = self._resumed_order()
        else:
            self._position = 0
            self._start = self._generator().get_state() if self.shuffle else None
            order = self._order(self._generator())
            self._checksum = _checksum(order)
        self._resume = False
        size, stop = self.batch_size, self._count(len(order)) * self.batch_size
        jobs = (order[at : at + size] for at in range(self._position * size, stop, size))
        return self._batches(jobs, run)

    def _batches(self, jobs: Iterator[_Rows], run: object) -> Iterator[Any]:
        fetch = _Fetch(self.dataset, self.collate_fn, self.pin_memory and _pins())
        if not self.num_workers:
            source: Iterator[Any] = (fetch(rows) for rows in jobs)
        else:
            ahead = self.num_workers * self.prefetch
            source = Prefetch(fetch, jobs, workers=self.num_workers, ahead=ahead)
        with closing(source):  # type: ignore[type-var]
            for batch in source:
                if self._run is run:  # a later iter(loader) has taken over otherwise
                    self._position += 1
                yield batch
        if self._run is run:
            self._epoch, self._position, self._start = self._epoch + 1, 0, None

    def _generator(self) -> random.Generator:
        return random.default_generator if self.generator is None else self.generator

    def _order(self, generator: random.Generator) -> _Rows:
        n = len(self.dataset)
        if self.shuffle:
            return np.asarray(random.randperm(n, generator=generator).data)
        if self.sampler is None:
            return np.arange(n, dtype=np.int64)
        return np.fromiter((int(i) for i in self.sampler), np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as JSON-able values, for `load_state_dict` to go on from.

        epoch (finished ones), position (batches handed out in this one), the generator's state at
        the start of this epoch and now, and what is needed to refuse a different dataset. Taken in
        the loop's body it counts the batch at hand as done.
        """
        return {
            "epoch": self._epoch,
            "position": self._position,
            "epoch_start": self._start,
            "generator": self._generator().get_state() if self.shuffle else None,
            "order": self._checksum if self._position else 0,
            "samples": len(self.dataset),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next `iter(loader)` gives the batches that followed `state_dict()`, bitwise.

        Sets the generator (the default one too) to its state at the time of saving; the order of
        the epoch is drawn again from a generator of its own. With a `sampler`, the sampler must
        give the same order again; `iter` raises RuntimeError if the order differs.

        Raises:
            ValueError: a malformed state, or one of another dataset or batch size; nothing changes.
        """
        self._check(state)
        if self.shuffle:
            self._generator().set_state(state["generator"])
        self._epoch, self._position = state["epoch"], state["position"]
        self._start, self._checksum = state["epoch_start"], state["order"]
        self._resume = self._position > 0
        self._run = None

    def _check(self, state: Mapping[str, Any]) -> None:
        for key in ("epoch", "position", "order", "samples", "batch_size"):
            value = state.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"DataLoader: state needs an integer {key!r} ≥ 0, got {value!r}")
        for key, own in (("samples", len(self.dataset)), ("batch_size", self.batch_size)):
            if state[key] != own:
                raise ValueError(f"DataLoader: state has {key} {state[key]}, the loader has {own}")
        if state["position"] > len(self):
            at = state["position"]
            raise ValueError(f"DataLoader: state has position {at} of {len(self)} batches")
        needed = ("generator", "epoch_start") if state["position"] else ("generator",)
        for key in needed if self.shuffle else ():
            if not isinstance(state.get(key), dict):
                raise ValueError(f"DataLoader: state needs a generator's state in {key!r}")
            random.Generator(0).set_state(state[key])  # raises if it cannot be one

    def _resumed_order(self) -> _Rows:
        scratch = random.Generator(0)
        if self._start is not None:
            scratch.set_state(self._start)
        order = self._order(scratch)
        if _checksum(order) != self._checksum:
            raise RuntimeError(
                "DataLoader: cannot resume: the order of this epoch is not the one that was saved "
                "(another sampler or shuffle setting, or another NumPy version)"
            )
        return order


class _Fetch:
    """Rows to a batch. Knows nothing of the loader: threads that hold it do not keep it alive."""

    def __init__(self, dataset: Dataset, collate_fn: Callable[[Sequence[Any]], Any] | None,
                 pin: bool) -> None:
        self.dataset, self.collate_fn, self.pin = dataset, collate_fn, pin

    def __call__(self, rows: _Rows) -> Any:
        return pinned(self._batch(rows)) if self.pin else self._batch(rows)

    def _batch(self, rows: _Rows) -> Any:
        if self.collate_fn is None and (whole := gather(self.dataset, rows)) is not None:
            return list(whole)
        samples = [self.dataset[i] for i in rows.tolist()]
        return (self.collate_fn or default_collate)(samples)


def _pins() -> bool:
    """Whether memory can be pinned; warns, as PyTorch does, where it cannot."""
    try:
        checked_device("cuda")
    except RuntimeError as error:
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found, then "
                      f"device pinned memory won't be used: {error}", stacklevel=3)
        return False
    return True


def _at_least(low: int, name: str, value: int) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
        raise ValueError(f"DataLoader: {name} should be an integer ≥ {low}, but got {name}={value}")
    return int(value)


def _checksum(order: _Rows) -> int:
    return zlib.crc32(np.ascontiguousarray(order, "<i8").tobytes())
