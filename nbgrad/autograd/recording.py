"""An op: a function of Tensors that is run and, where a gradient is wanted, recorded as a Node.

An op returns its value and its vjp, a few lines apart::

    @op
    def matmul(a, b, /):
        return kernels(a).matmul(a.data, b.data), (lambda dy: dy @ mT(b), lambda dy: mT(a) @ dy)

Parameters before ``/`` are tensors, the others are settings. The vjp is one function per input
where the gradients are independent, one function of all output cotangents where they share work.
What it mentions is what the graph keeps alive. It is written in ops, so that under ``create_graph``
a gradient is a graph like any other. Values after the vjp are returned and not differentiated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, overload

from numpy import ndarray

from nbgrad.backend import constant as constant_like, several

from . import versions
from .mode import state
from .node import OPS, Node, Part
from .promotion import constant, promoted
from .tensors import Tensor, new, wrap

__all__ = ["Op", "op", "transient"]


class Op:
    """A recorded function; ``fn`` is the bare one. Calling it converts, runs, records."""

    def __init__(self, fn: Callable[..., Any], name: str | None = None, *, view: bool = False,
                 saves_output: bool = False, promote: bool = False, method: bool = True) -> None:
        self.fn, self.name, self.__doc__ = fn, name or fn.__name__.lstrip("_"), fn.__doc__
        self.__name__ = self.__qualname__ = self.name
        self.__module__, self.__wrapped__ = fn.__module__, fn
        self.view, self.saves_output, self.promote = view, saves_output, promote
        parameters = inspect.signature(fn).parameters.values()
        self.tensors = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        self.settings = [p.name for p in parameters
                         if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.required = sum(p.default is p.empty for p in parameters if p.name in self.tensors)
        self.arity = len(self.tensors)
        if self.name in OPS:
            raise ValueError(f"there is already an op called {self.name!r}")
        OPS[self.name] = self
        if method and not hasattr(Tensor, self.name):
            setattr(Tensor, self.name, lambda *args, **kwargs: self(*args, **kwargs))

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        if len(inputs) != self.arity and not self.variadic:
            inputs, settings = self._bind(inputs, settings)
        edges: list[Any] = []
        wanted = 0
        for x in inputs:
            if isinstance(x, Tensor):
                if x.requires_grad:
                    wanted += 1
                    edges.append(x.grad_fn or x)
                else:
                    edges.append(None)
            elif x is None:
                if inputs[0] is None or self.promote:
                    raise TypeError(f"{self.name}: expected a Tensor, got None")
                edges.append(None)
            else:
                return self(*self._convert(inputs), **settings)
        if several and (moved := self._on_one_device(inputs)) is not None:
            return self(*moved, **settings)
        if self.promote and inputs[0].data.dtype is not inputs[1].data.dtype:
            p, q = promoted(*inputs)
            if p is not inputs[0] or q is not inputs[1]:
                return self(p, q, **settings)
        result = self.fn(*inputs, **settings) if settings else self.fn(*inputs)
        y, vjp = result[0], result[1]
        if type(y) is ndarray:
            out = new(Tensor)
            out.data = y
        else:
            out = wrap(y)
        if wanted and vjp is not None and state.recording:
            node = new(Node)
            node.op, node.edges, node.clock = self, edges, versions.clock
            if settings:
                node.settings = settings
            if wanted < len(edges) and type(vjp) is tuple:  # nobody asks these: free what they hold
                vjp = [f if e is not None else None for f, e in zip(vjp, edges)]
            node.vjp = vjp
            if type(out) is tuple:
                _parts(out, node)
            else:
                out.requires_grad, out.grad_fn = True, node
                node.shape, node.dtype = out.data.shape, out.data.dtype
                if self.saves_output:
                    node.output = kept = new(Tensor)
                    kept.data = out.data
                    out._version = kept._version = [0]
        if self.view:
            versions.share_version(inputs[0], out)
        return out if len(result) == 2 else (out, *map(wrap, result[2:]))

    def _bind(self, args: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Sort out optional tensors, tensors by keyword and settings by position."""
        tensors = list(args[:self.arity])
        extra = args[self.arity:]
        if len(extra) > len(self.settings):
            raise TypeError(f"{self.name}() takes at most {self.arity + len(self.settings)} "
                            f"arguments, got {len(args)}")
        settings = {**dict(zip(self.settings, extra)), **settings}
        for name, own in zip(("input", "other"), self.tensors):     # as PyTorch calls the first two
            if name in settings and name not in self.tensors:
                settings[own] = settings.pop(name)
        for name in self.tensors[len(tensors):]:
            if name not in settings and len(tensors) < self.required:
                raise TypeError(f"{self.name}() missing required argument {name!r}")
            tensors.append(settings.pop(name, None))
        return tuple(tensors), settings

    def _on_one_device(self, inputs: Any) -> Any:
        """The inputs with CPU tensors of one number, as PyTorch takes them, where the others are;
        None if all are on one device. Raises RuntimeError if others differ."""
        places = dict.fromkeys(x.device for x in inputs if x is not None)
        if len(places) < 2:
            return None
        like = next(x for x in inputs if x is not None and x.device != "cpu")
        places = dict.fromkeys(x.device for x in inputs if x is not None
                               and (x.device != "cpu" or x.data.ndim))
        if len(places) > 1:
            raise RuntimeError(f"{self.name}: expected all tensors to be on the same device, but "
                               f"found at least two devices, {' and '.join(places)}")
        return [x if x is None or x.device != "cpu" else
                OPS["to_device"](x, device=like.device) if x.requires_grad else
                wrap(constant_like(x.data, x.data.dtype, like.data)) for x in inputs]

    def _convert(self, inputs: Iterable[Any]) -> tuple[Tensor | None, ...]:
        inputs = tuple(inputs)
        like = next((x for x in inputs if isinstance(x, Tensor)), None)
        return tuple(x if x is None or isinstance(x, Tensor) else constant(x, like, self.name)
                     for x in inputs)


@overload
def op(fn: Callable[..., Any], /) -> Op: ...
@overload
def op(*, name: str | None = None, **options: bool) -> Callable[[Callable[..., Any]], Op]: ...
def op(fn: Callable[..., Any] | None = None, /, name: str | None = None, **options: bool) -> Any:
    """Decorator: file a function as an op. ``view=True``: the output shares the first input's
    memory. ``saves_output=True``: the vjp takes ``(dy, y)``. ``promote=True``: its two inputs get
    one dtype. ``method=False``: not a method of Tensor."""
    if fn is None:
        return lambda f: Op(f, name, **options)
    return Op(fn, name)


def transient(op: Any, inputs: Iterable[Any], *names: str, **settings: Any) -> Any:
    """op(*inputs, **settings), of which the settings ``names`` are for this run alone: what the
    graph keeps and shows is the function."""
    out = op(*inputs, **settings)
    node = (out[0] if type(out) is tuple else out).grad_fn
    if node is not None:
        for name in names:
            node.settings.pop(name, None)
    return out


def _parts(outs: tuple[Tensor, ...], node: Node) -> None:
    """Give each of a Node's outputs its Part."""
    node.shape, node.dtype = tuple(out.data.shape for out in outs), outs[0].data.dtype
    for i, out in enumerate(outs):
        part = new(Part)
        part.op, part.edges, part.vjp = node.op, (node,), ()
        part.shape, part.dtype, part.clock = out.data.shape, out.data.dtype, i
        out.requires_grad, out.grad_fn = True, part
