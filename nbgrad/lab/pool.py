"""Processes that run cells side by side, each with one thread."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["Answer", "Request", "cores", "run_all"]

Request = tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]     # run, cell
Answer = dict[str, Any]                     # see worker
_ALONE = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
          "VECLIB_MAXIMUM_THREADS")


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(requests: Sequence[Request], processes: int,
            answered: Callable[[int, Answer], None], stopped: Callable[[], bool]) -> bool:
    """Run every request; ``answered(i, answer)`` is called in this thread, as answers come.

    What a cell raises, and a process that dies of one, is an answer with "error": the others go
    on. ``stopped`` is asked about ten times a second; when it says so, the processes are killed
    and False is returned. ``processes`` 0 runs them in this one, between which it is asked.
    """
    if processes == 0:
        return _here(requests, answered, stopped)
    named = [(_reference(run), cell) for run, cell in requests]
    waiting, answers = deque(enumerate(named)), queue.SimpleQueue[tuple[int, Answer]]()
    workers = [Worker() for _ in range(min(processes, len(requests)))]
    threads = [threading.Thread(target=_serve, args=(w, waiting, answers), daemon=True)
               for w in workers]
    for thread in threads:
        thread.start()
    done, stop = 0, False
    try:
        while done < len(requests) and not stop:
            with suppress(queue.Empty):
                answered(*answers.get(timeout=0.1))
                done += 1
            stop = stopped()
    finally:
        waiting.clear()
        for worker in workers:
            worker.stop(kill=done < len(requests))
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.release()
    while not answers.empty():              # what was finished while the last one was being kept
        i, answer = answers.get()
        if "record" in answer:
            answered(i, answer)
            done += 1
    return done == len(requests)


def _here(requests: Sequence[Request], answered: Callable[[int, Answer], None],
          stopped: Callable[[], bool]) -> bool:
    from nbgrad.lab.worker import answer

    for i, (run, cell) in enumerate(requests):
        if stopped():
            return False
        answered(i, answer(run, json.loads(json.dumps(cell))))
    return True


def _reference(run: Callable[..., Any]) -> str:
    """Where another process finds a function."""
    module, name = run.__module__, run.__qualname__
    if module == "__main__" or not name.isidentifier():
        raise ValueError("run must be a function of a module that can be imported, got "
                         f"{module}.{name}; or run it with processes=0")
    return f"{module}:{name}"


def _serve(worker: Worker, waiting: deque[tuple[int, tuple[str, dict[str, Any]]]],
           answers: queue.SimpleQueue[tuple[int, Answer]]) -> None:
    while True:
        try:
            i, (function, cell) = waiting.popleft()
        except IndexError:
            return
        answers.put((i, worker.ask(function, cell)))


class Worker:
    """A process with one thread, which does not listen to Ctrl-C: its parent ends it.

    One that died is started again for the next cell.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._said = tempfile.TemporaryFile()       # noqa: SIM115 - `release` closes it
        # the parent's path and no more: beside a checkout, a folder called nbgrad, Python takes the
        # working directory's for the package
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        own = {**dict.fromkeys(_ALONE, "1"), "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nbgrad.lab.worker"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._said, env={**os.environ, **own})
        self._in: Any = self._process.stdin
        self._out: Any = self._process.stdout

    def ask(self, function: str, cell: dict[str, Any]) -> Answer:
        """The answer; one with "error" where the process died."""
        with self._lock:
            if self._closed:
                return {"error": "stopped", "trace": ""}
            if self._process.poll() is not None:
                self.release()
                self._start()
        request = {"function": function, "cell": cell, "path": sys.path}
        line = b""
        with suppress(OSError, ValueError):  # it is gone: so says the empty line
            self._in.write(json.dumps(request).encode() + b"\n")
            self._in.flush()
            line = self._out.readline()
        if line.endswith(b"\n"):
            answer: Answer = json.loads(line)
            return answer
        return {"error": _ended(self._process.wait()), "trace": self._last_words()}

    def stop(self, kill: bool) -> None:
        """End the process: now, or, idle as it is, by the end of its input."""
        with self._lock:
            self._closed = True
            if kill:
                self._process.kill()
            else:
                with suppress(OSError):
                    self._in.close()

    def release(self) -> None:
        """Wait for its end and close its files."""
        self._process.wait()
        for file in (self._in, self._out, self._said):
            with suppress(OSError):
                file.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        return self._said.read()[-4000:].decode(errors="replace")


def _ended(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    try:
        return f"its process was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"its process was ended by signal {-status}"
