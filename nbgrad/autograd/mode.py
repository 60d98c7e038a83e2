"""Whether ops are recorded: ``no_grad``, ``enable_grad`` and ``set_grad_enabled``, per thread."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

__all__ = ["enable_grad", "is_grad_enabled", "no_grad", "set_grad_enabled", "state"]


class _Mode(threading.local):
    recording = True


state = _Mode()


class _Recording:
    """A reusable, re-entrant context manager and decorator for one setting of the mode."""

    mode: bool

    def __init__(self) -> None:
        self.before: list[bool] = []

    def __enter__(self) -> None:
        self.before.append(state.recording)
        state.recording = self.mode

    def __exit__(self, *exc: object) -> None:
        state.recording = self.before.pop()

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(f):
            return self._stepwise(f)

        @wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return f(*args, **kwargs)
        return call

    def _stepwise(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """A generator runs step by step; whoever takes its values has a mode of its own."""
        @wraps(f)
        def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            steps = f(*args, **kwargs)
            while True:
                with self:
                    try:
                        value = next(steps)
                    except StopIteration:
                        return
                yield value
        return generate


class set_grad_enabled(_Recording):
    """Turn recording on or off, at once; as a context manager until its block ends, or for every
    call of a function that it decorates."""

    def __init__(self, mode: bool) -> None:
        self.mode, self.before, self.noted = bool(mode), [state.recording], True
        state.recording = self.mode

    def __enter__(self) -> None:
        if not self.noted:
            self.before.append(state.recording)
        self.noted, state.recording = False, self.mode

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        state.recording, self.noted = self.before.pop(), False
        return super().__call__(f)


class no_grad(_Recording):
    """Context manager or decorator: record nothing.

    >>> from nbgrad import no_grad, tensor
    >>> x = tensor([1.0], requires_grad=True)
    >>> with no_grad():
    ...     (x * 2).requires_grad
    False
    """

    mode = False


class enable_grad(_Recording):
    """Context manager or decorator: record, also inside ``no_grad``."""

    mode = True


def is_grad_enabled() -> bool:
    """Whether ops on tensors that require grad are recorded in this thread."""
    return state.recording
