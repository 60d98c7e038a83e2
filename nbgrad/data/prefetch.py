"""Threads that compute the next batches while the current one is trained on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Todo = SimpleQueue[tuple["Future[Any]", Any] | None]
_PATIENCE = 1.0  # seconds close() waits for threads that are in the middle of a batch


class Prefetch(Iterator[Any]):
    """`map(fetch, jobs)` in order, computed by `workers` threads, `ahead` jobs in front at most.

    An error in fetch is raised where its result would have come. After close(), or when the
    iterator is dropped, no thread starts another job. Threads are daemons, so that a fetch that
    hangs cannot keep the process from ending after Ctrl-C.
    """

    def __init__(
        self, fetch: Callable[[Any], Any], jobs: Iterable[Any], *, workers: int, ahead: int
    ) -> None:
        self._jobs = iter(jobs)
        self._ahead = ahead
        self._todo: _Todo = SimpleQueue()
        self._pending: deque[Future[Any]] = deque()
        self._threads: list[threading.Thread] = []
        for i in range(workers):
            # the threads know fetch and the queue, not self: dropping self must be enough to end
            thread = threading.Thread(
                target=_work, args=(fetch, self._todo), name=f"nbgrad-data-{i}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._refill()

    def _refill(self) -> None:
        while self._threads and len(self._pending) < self._ahead:
            try:
                job = next(self._jobs)
            except StopIteration:
                return
            future: Future[Any] = Future()
            self._pending.append(future)
            self._todo.put((future, job))

    def __next__(self) -> Any:
        if not self._pending:
            raise StopIteration
        result = self._pending.popleft().result()
        self._refill()
        return result

    def close(self) -> None:
        """Drops what is pending and ends the threads."""
        while self._pending:
            self._pending.popleft().cancel()
        threads, self._threads = self._threads, []
        for _ in threads:
            self._todo.put(None)
        deadline = time.monotonic() + _PATIENCE
        for thread in threads:
            # a garbage collection may run this in one of the threads
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def __del__(self) -> None:
        self.close()


def _work(fetch: Callable[[Any], Any], todo: _Todo) -> None:
    while (task := todo.get()) is not None:
        future, job = task
        if future.set_running_or_notify_cancel():
            try:
                result = fetch(job)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del task, future, job  # while it waits, a thread must not keep a batch alive
