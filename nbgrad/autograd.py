"""The engine: Tensor, Op, Node, backward.

An op is a function of Tensors that returns its value and its vjp, a few lines apart::

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
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, overload

import numpy as np

__all__ = ["OPS", "Node", "Op", "Tensor", "as_tensor", "bump", "composition", "enable_grad", "grad",
           "is_grad_enabled", "no_grad", "op", "promoted", "set_grad_enabled", "tensor"]

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
ndarray = np.ndarray


# ---------------------------------------------------------------------------------------- recording

class _Mode(threading.local):
    recording = True


_mode = _Mode()


class _Recording:
    """A reusable, re-entrant context manager and decorator for one setting of the mode."""

    mode: bool

    def __init__(self) -> None:
        self.before: list[bool] = []

    def __enter__(self) -> None:
        self.before.append(_mode.recording)
        _mode.recording = self.mode

    def __exit__(self, *exc: object) -> None:
        _mode.recording = self.before.pop()

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        from functools import wraps

        if inspect.isgeneratorfunction(f):
            return self._stepwise(f)

        @wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return f(*args, **kwargs)
        return call

    def _stepwise(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """A generator runs step by step; whoever takes its values has a mode of its own."""
        from functools import wraps

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
        self.mode, self.before, self.noted = bool(mode), [_mode.recording], True
        _mode.recording = self.mode

    def __enter__(self) -> None:
        if not self.noted:
            self.before.append(_mode.recording)
        self.noted, _mode.recording = False, self.mode

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        _mode.recording, self.noted = self.before.pop(), False
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
    return _mode.recording


class Node:
    """One recorded op: edges to where its inputs came from, and the vjp that maps dy back to them.

    An edge is the input's own Node, the input itself if it is a leaf, or None if it needs no
    gradient: the graph keeps alive only what the vjp mentions.
    """

    op: Op
    edges: Sequence[Node | Tensor | None]
    vjp: Any                           # a function, several functions, or None once used
    shape: Any                         # of the output; a tuple of shapes if there are several
    dtype: Any
    clock: int                         # what is modified in place later is too new for the vjp
    settings: dict[str, Any] = {}      # noqa: RUF012 (never written to)
    output: Tensor | None = None       # the value, detached, if the vjp uses it
    hooks: list[Callable[[Tensor], Tensor | None]] | None = None

    @property
    def name(self) -> str:
        return self.op.name

    def __repr__(self) -> str:
        return f"<{self.op.name}>"


class _Part(Node):
    """One of the outputs of a Node that has several; ``clock`` is its number."""


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
        wanted, record = 0, _mode.recording
        for x in inputs:
            if isinstance(x, Tensor):
                if record:
                    if x.requires_grad:
                        wanted += 1
                        edges.append(x.grad_fn or x)
                    else:
                        edges.append(None)
            elif x is None:
                if inputs[0] is None:
                    raise TypeError(f"{self.name}: expected a Tensor, got None")
                edges.append(None)
            else:
                return self(*self._convert(inputs), **settings)
        if self.promote and inputs[0].data.dtype is not inputs[1].data.dtype:
            p, q = promoted(*inputs)
            if p is not inputs[0] or q is not inputs[1]:
                return self(p, q, **settings)
        result = self.fn(*inputs, **settings)
        y, vjp = result[0], result[1]
        if not wanted or vjp is None:
            out = _wrap(y)
        else:
            node = _new(Node)
            node.op, node.edges, node.clock = self, edges, _clock
            if settings:
                node.settings = settings
            if wanted < len(edges) and type(vjp) is tuple:  # nobody asks these: free what they hold
                vjp = [f if e is not None else None for f, e in zip(vjp, edges)]
            node.vjp = vjp
            if type(y) is tuple:
                out = _parts(y, node)
            else:
                out = _new(Tensor)
                out.data = y = y if type(y) is ndarray else np.asarray(y)
                out.requires_grad, out.grad_fn = True, node
                node.shape, node.dtype = y.shape, y.dtype
                if self.saves_output:
                    node.output = kept = _new(Tensor)
                    kept.data = y
                    out._version = kept._version = [0]
        if self.view:
            _share_version(inputs[0], out)
        return out if len(result) == 2 else (out, *map(_wrap, result[2:]))

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

    def _convert(self, inputs: Iterable[Any]) -> tuple[Tensor | None, ...]:
        inputs = tuple(inputs)
        like = next((x for x in inputs if isinstance(x, Tensor)), None)
        return tuple(x if x is None or isinstance(x, Tensor) else _constant(x, like, self.name)
                     for x in inputs)


OPS: dict[str, Op] = {}
_new = object.__new__


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


@overload
def _wrap(y: Array) -> Tensor: ...
@overload
def _wrap(y: Any) -> Any: ...
def _wrap(y: Any) -> Any:
    if type(y) is tuple:
        return tuple(map(_wrap, y))
    out = _new(Tensor)
    out.data = y if type(y) is ndarray else np.asarray(y)
    return out


def _parts(ys: tuple[Array, ...], node: Node) -> tuple[Tensor, ...]:
    outs = []
    node.shape, node.dtype = tuple(y.shape for y in ys), ys[0].dtype
    for i, y in enumerate(ys):
        out, part = _wrap(y), _new(_Part)
        part.op, part.edges, part.vjp = node.op, (node,), ()
        part.shape, part.dtype, part.clock = y.shape, y.dtype, i
        out.requires_grad, out.grad_fn = True, part
        outs.append(out)
    return tuple(outs)


def _constant(x: Any, like: Tensor | None, op_name: str) -> Tensor:
    """A Python number takes the dtype of its neighbour where its kind allows, as in PyTorch."""
    if isinstance(x, (bool, int, float)) and like is not None:
        dtype = like.data.dtype
        if isinstance(x, float) and dtype.kind != "f":
            dtype = np.dtype(np.float32)
        elif not isinstance(x, bool) and dtype.kind == "b":
            dtype = np.dtype(np.int64)
        array: Array = np.array(x, dtype)
        return _wrap(array)
    if isinstance(x, (bool, int, float, ndarray, np.generic, list, tuple)):
        return as_tensor(x)
    raise TypeError(f"{op_name}: expected a Tensor, an array or a number, got {type(x).__name__}")


def promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their result, by PyTorch's rule: a float beats an int whatever its
    width, and within a kind a 0-d tensor does not widen one that has dimensions."""
    p, q = a.data.dtype, b.data.dtype
    if p == q:
        return a, b
    rank = "biuf".replace("u", "")
    kinds = [rank.index(d.kind.replace("u", "i")) for d in (p, q)]
    if kinds[0] != kinds[1]:
        dtype = p if kinds[0] > kinds[1] else q
    elif bool(a.data.ndim) != bool(b.data.ndim):
        dtype = p if a.data.ndim else q
    else:
        dtype = np.promote_types(p, q)
    return a.to(dtype), b.to(dtype)


# ---------------------------------------------------------------------------- in-place modification

_clock = 0                  # counts in-place modifications; a node remembers when it was recorded


def bump(t: Tensor) -> None:
    """Say that ``t.data`` was written to: a vjp that still needs the old value will raise."""
    global _clock
    _clock += 1
    if t._version is None:
        t._version = [0]
    t._version[0] = _clock


def _share_version(base: Tensor, view: Tensor) -> None:
    """Memory that several tensors see has one version, which knows the tensors: [clock, when to
    look for dead ones, refs …]."""
    version = base._version
    if version is None:
        version = base._version = [0]
    if len(version) == 1:
        version += [16, weakref.ref(base)]
    if len(version) > version[1]:
        version[2:] = [r for r in version[2:] if r() is not None]
        version[1] = max(16, 2 * len(version))
    version.append(weakref.ref(view))
    view._version = version


def saved_tensors(node: Node) -> Iterator[tuple[str, Any]]:
    """Names and values (Tensors and arrays) that a node's vjp keeps alive."""
    functions = node.vjp if type(node.vjp) in (tuple, list) else (node.vjp,)
    seen: set[int] = set()
    stack = [f for f in functions if f is not None][::-1]
    while stack:
        f = stack.pop()
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or ()):
            values = cell.cell_contents
            for value in values if type(values) in (list, tuple) else (values,):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                if isinstance(value, (Tensor, ndarray)):
                    yield name, value
                elif inspect.isfunction(value):
                    stack.append(value)
    if node.output is not None:
        yield "y", node.output


def _unmodified(node: Node) -> bool:
    """Whether no tensor in the vjp's own closure is newer than the node: the quick half of the
    check. Batch norm writes to its running statistics in every step: this runs for most nodes."""
    vjp = node.vjp
    for f in vjp if type(vjp) in (tuple, list) else (vjp,):
        for cell in (f.__closure__ or ()) if f is not None else ():
            value = cell.cell_contents
            if isinstance(value, Tensor):
                if value._version is not None and value._version[0] > node.clock:
                    return False
            elif type(value) in (FunctionType, list, tuple):
                return False                 # tensors may hide in there
    y = node.output
    return y is None or y._version is None or y._version[0] <= node.clock


def _check_unmodified(node: Node) -> None:
    if _unmodified(node):
        return
    for name, t in saved_tensors(node):
        if isinstance(t, Tensor) and t._version is not None and t._version[0] > node.clock:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {name!r} of shape {t.shape}, saved by {node.op.name}")


# ----------------------------------------------------------------------------------------- backward

_USED = ("Trying to backward through the graph a second time (or directly access saved tensors "
         "after they have already been freed). Specify retain_graph=True if you need to backward "
         "through the graph a second time.")


def _pending(roots: Sequence[Node], stop: set[Node]) -> dict[Any, int]:
    """For everything reachable: how many cotangents will arrive there."""
    pending: dict[Any, int] = dict.fromkeys(roots, 0)
    stack = list(pending)
    while stack:
        node = stack.pop()
        if node in stop:
            continue
        for edge in node.edges:
            if edge is not None:
                if edge in pending:
                    pending[edge] += 1
                else:
                    pending[edge] = 1
                    if isinstance(edge, Node):
                        stack.append(edge)
    return pending


def _leading_to(targets: set[Any], roots: Sequence[Node], pending: dict[Any, int]) -> set[Any]:
    """The nodes from which a target can be reached; a target only if another lies behind it."""
    left, order, ready = dict(pending), [], [r for r in dict.fromkeys(roots) if not pending[r]]
    while ready:
        node = ready.pop()
        order.append(node)
        for edge in node.edges:
            if edge is not None:
                left[edge] -= 1
                if not left[edge] and isinstance(edge, Node):
                    ready.append(edge)
    needed: set[Any] = set()
    for node in reversed(order):
        if any(edge in targets or edge in needed for edge in node.edges):
            needed.add(node)
    return needed


def _run(roots: Sequence[Tensor], dys: Sequence[Tensor], targets: set[Any] | None, *,
         retain: bool, record: bool, stop: bool = False) -> dict[Any, Tensor]:
    """Carry cotangents from the roots back. Leaves get ``.grad``, or, with ``targets``, only these
    are computed and returned. ``stop``: the targets' own histories are not entered."""
    sources = [r.grad_fn or r for r in roots]
    nodes = [s for s in sources if isinstance(s, Node)]
    pending = _pending(nodes, targets if stop and targets else set())
    needed = None if targets is None or stop else _leading_to(targets, nodes, pending)
    dy_of: dict[Any, Any] = {}
    found: dict[Any, Tensor] = {}
    for source, dy in zip(sources, dys):
        dy_of[source] = _add(dy_of.get(source), dy)
    ready: list[Any] = [s for s in dict.fromkeys(sources) if not pending.get(s)]
    with set_grad_enabled(record):
        while ready:
            node = ready.pop()
            dy = dy_of.pop(node, None)
            leaf = isinstance(node, Tensor)
            if dy is not None:
                hooks = node._hooks if leaf else node.hooks
                if hooks:
                    dy = _hooked(hooks, dy, node)
                if leaf if targets is None else node in targets:
                    found[node] = dy
            if leaf or (stop and node in targets):  # type: ignore[operator]
                continue
            wanted = dy is not None and (needed is None or node in needed)
            dxs = _pull(node, dy, retain) if wanted else (None,) * len(node.edges)
            for edge, dx in zip(node.edges, dxs):
                if edge is None:
                    continue
                if dx is not None and (needed is None or edge in needed or edge in targets):  # type: ignore[operator]
                    if not record and isinstance(edge, Tensor):
                        dx = _owned(dx, dy, dxs)
                    _deliver(dy_of, edge, dx, node)
                pending[edge] -= 1
                if not pending[edge]:
                    ready.append(edge)
        if targets is None:               # last: an error on the way leaves every .grad as it was
            for x, dx in found.items():
                _accumulate(x, dx, record)
    return found


def _pull(node: Node, dy: Any, retain: bool) -> Sequence[Any]:
    """The vjp of one node: cotangents of its inputs."""
    vjp = node.vjp
    if vjp is None:
        raise RuntimeError(_USED)
    if isinstance(node, _Part):
        return (dy,)
    if node.clock != _clock:
        _check_unmodified(node)
    if node.output is not None:
        y = _wrap(node.output.data)
        y.requires_grad, y.grad_fn = True, node
        args: Sequence[Any] = (dy, y)
    else:
        args = dy if type(dy) is list else (dy,)
    if type(vjp) in (tuple, list):
        dxs: Any = [f(*args) if f is not None else None for f in vjp]
    else:
        dxs = vjp(*args)
        if type(dxs) is not tuple and type(dxs) is not list:
            dxs = (dxs,)
    if not retain:
        node.vjp = node.output = None
    return dxs  # type: ignore[no-any-return]


def _deliver(dy_of: dict[Any, Any], edge: Any, dx: Tensor, node: Node) -> None:
    if isinstance(node, _Part):                       # slot i of a node that has several outputs
        slots = dy_of.setdefault(edge, [None] * len(edge.shape))
        slots[node.clock] = _add(slots[node.clock], dx)
        return
    shape = edge.shape
    if dx.data.shape != shape:
        try:
            dx = OPS["sum_to"](dx, shape=shape)
        except (ValueError, IndexError):
            raise RuntimeError(f"{node.op.name}: its vjp returned a gradient of shape {dx.shape} "
                               f"for an input of shape {shape}") from None
    before = dy_of.get(edge)
    dy_of[edge] = dx if before is None else OPS["add"](before, dx)


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else OPS["add"](a, b)


def _hooked(hooks: list[Any], dy: Any, owner: Node | Tensor) -> Any:
    for hook in list(hooks):
        new = hook(dy)
        if new is None:
            continue
        tensor = isinstance(new, Tensor)
        if not tensor or new.shape != dy.shape or new.dtype != dy.dtype:
            got = f"{new.dtype} of shape {new.shape}" if tensor else type(new).__name__
            name = owner.name if isinstance(owner, Node) else "a leaf"
            raise RuntimeError(f"a hook on {name} returned {got}: expected None or a Tensor like "
                               f"the gradient, {dy.dtype} of shape {dy.shape}")
        dy = new
    return dy


def _owned(dx: Tensor, dy: Any, dxs: Sequence[Any]) -> Tensor:
    """A leaf keeps its gradient, and users scale it in place: it must not be somebody else's."""
    shared = dx is dy or isinstance(dx.data.base, ndarray)
    others = 0
    for d in dxs:
        if d is dx:
            others += 1
    return _wrap(dx.data.copy(order="K")) if shared or others > 1 else dx


def _accumulate(leaf: Tensor, dy: Tensor, record: bool) -> None:
    if leaf.grad is None:
        leaf.grad = dy
    elif record:
        leaf.grad = _add(leaf.grad, dy)
    else:
        leaf.grad.data = leaf.grad.data + dy.data
        bump(leaf.grad)


def _cotangent(y: Tensor, given: Any, where: str) -> Tensor:
    if not y.requires_grad:
        raise RuntimeError(f"{where}: element 0 of tensors does not require grad and does not have "
                           "a grad_fn")
    if given is None:
        if y.data.size != 1:
            raise RuntimeError(f"{where}: grad can be implicitly created only for scalar outputs, "
                               f"got shape {y.shape}; pass a gradient of that shape")
        return _wrap(np.ones(y.data.shape, y.data.dtype))
    dy = given if isinstance(given, Tensor) else as_tensor(np.asarray(given, y.data.dtype))
    if dy.shape != y.shape:
        raise RuntimeError(f"{where}: mismatch in shape: gradient has shape {dy.shape}, the output "
                           f"has shape {y.shape}")
    return dy.to(y.dtype)


def grad(outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor],
         grad_outputs: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
         allow_unused: bool = False) -> tuple[Tensor | None, ...]:
    """∂outputs/∂inputs contracted with ``grad_outputs`` (1 for scalars); leaves ``.grad`` alone.

    Raises RuntimeError if an input is not in the graph, unless ``allow_unused`` (then None).

    >>> from nbgrad import grad, tensor
    >>> x = tensor(3.0, requires_grad=True)
    >>> (dx,) = grad(x ** 3, x, create_graph=True)
    >>> dx.item(), grad(dx, x)[0].item()
    (27.0, 18.0)
    """
    ys = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    xs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    listed = isinstance(grad_outputs, (list, tuple)) or not isinstance(outputs, Tensor)
    dys = tuple(grad_outputs) if listed and grad_outputs is not None else (grad_outputs,)
    dys = dys * len(ys) if dys == (None,) else dys
    if len(dys) != len(ys):
        raise ValueError(f"grad: got {len(ys)} outputs and {len(dys)} grad_outputs")
    for x in xs:
        if not x.requires_grad:
            raise RuntimeError("grad: one of the differentiated Tensors does not require grad")
    targets = {x.grad_fn or x for x in xs}
    retain = create_graph if retain_graph is None else retain_graph
    found = _run(ys, [_cotangent(y, dy, "grad") for y, dy in zip(ys, dys)], targets,
                 retain=retain, record=create_graph)
    dxs = tuple(found.get(x.grad_fn or x) for x in xs)
    if None in [dx if dx is None else 0 for dx in dxs] and not allow_unused:
        raise RuntimeError("grad: One of the differentiated Tensors appears to not have been used "
                           "in the graph. Set allow_unused=True if this is the desired behavior.")
    return dxs


def composition(f: Callable[..., Any], *xs: Tensor | None) -> Callable[..., Any]:
    """The vjp of ``f`` at ``xs``, found by recording ``f`` when it is asked for.

    For a fused op whose own gradient is rarely needed: ``f`` is the same function in elementary
    ops. It recomputes everything from ``xs``, so the gradient is exact at every order.
    """
    def vjp(*dys: Tensor | None) -> list[Tensor | None]:
        again = _mode.recording
        with enable_grad():
            at = [x if x is None or not x.requires_grad else
                  OPS["alias"](x) if again else x.detach().requires_grad_() for x in xs]
            ys = f(*at)
            ys = ys if isinstance(ys, tuple) else (ys,)
            pairs = [(y, dy) for y, dy in zip(ys, dys) if dy is not None and y.requires_grad]
            targets = {x.grad_fn or x for x in at if x is not None and x.requires_grad}
            found = _run([y for y, _ in pairs], [dy for _, dy in pairs], targets,
                         retain=again, record=again, stop=True) if pairs else {}
        return [found.get(x.grad_fn or x) if x is not None and x.requires_grad else None
                for x in at]
    return vjp


# ------------------------------------------------------------------------------------------- Tensor

class Handle:
    """What a hook's registration returns; ``remove()`` takes the hook away."""

    def __init__(self, hooks: list[Any], hook: Any) -> None:
        self.hooks, self.hook = hooks, hook

    def remove(self) -> None:
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


class Tensor:
    """An array that remembers how it was computed.

    ``data`` is the NumPy array. Every op of ``nbgrad.ops`` is also a method. Names, argument order
    and meaning are PyTorch's; ``data``, ``dtype`` and ``shape`` are NumPy's.

    >>> import nbgrad
    >>> x = nbgrad.tensor([1.0, 2.0], requires_grad=True)
    >>> y = (x * x).sum()
    >>> y.backward()
    >>> x.grad
    tensor([2., 4.])
    """

    data: Array
    requires_grad: bool = False
    grad: Tensor | None = None
    grad_fn: Node | None = None
    _version: list[Any] | None = None        # [clock of the last in-place write, views …]
    _hooks: list[Any] | None = None
    _retained: Handle | None = None          # of retain_grad's hook
    __array_priority__ = 1000

    if TYPE_CHECKING:                        # what the ops and the loops below the class set
        def __getattr__(self, name: str) -> Any: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def __eq__(self, other: object) -> Any: ...
        def __ne__(self, other: object) -> Any: ...
        def __neg__(self) -> Tensor: ...
        def _binary(self, other: Any) -> Tensor: ...

        __abs__ = __invert__ = __neg__
        __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __matmul__ = _binary
        __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rpow__ = __rmatmul__ = _binary
        __floordiv__ = __mod__ = __and__ = __or__ = __xor__ = _binary
        __rfloordiv__ = __rmod__ = __rand__ = __ror__ = __rxor__ = _binary
        __lt__ = __le__ = __gt__ = __ge__ = _binary

    def __init__(self, data: Any, dtype: Any = None, requires_grad: bool = False) -> None:
        self.data = _array(data, dtype, copy=True)
        self.requires_grad_(requires_grad)

    # what it is
    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def is_leaf(self) -> bool:
        return self.grad_fn is None

    @property
    def device(self) -> str:
        return "cpu"

    def size(self, dim: int | None = None) -> Any:
        """Shape, or the length of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.data.ndim

    def numel(self) -> int:
        return self.data.size

    def is_floating_point(self) -> bool:
        return self.data.dtype.kind == "f"

    def __len__(self) -> int:
        if not self.data.ndim:
            raise TypeError("len() of a 0-d tensor")
        return len(self.data)

    def __repr__(self) -> str:
        text = np.array2string(self.data, precision=4, separator=", ", prefix="tensor(",
                               threshold=1000)
        if not self.data.size and self.ndim != 1:
            text += f", size={self.shape}"
        if self.dtype not in (np.float32, np.int64, np.bool_):
            text += f", dtype={self.dtype}"
        if self.grad_fn is not None:
            text += f", grad_fn={self.grad_fn!r}"
        elif self.requires_grad:
            text += ", requires_grad=True"
        return f"tensor({text})"

    # out of the graph
    def numpy(self) -> Array:
        """The array itself, not a copy. Raises RuntimeError if it requires grad."""
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. "
                               "Use tensor.detach().numpy() instead.")
        return self.data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.numpy(), dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        name = _UFUNCS.get(ufunc.__name__)
        if method == "__call__" and isinstance(kwargs.get("out", (None,))[0], ndarray):
            return ufunc(*[x.numpy() if isinstance(x, Tensor) else x for x in inputs], **kwargs)
        if method != "__call__" or kwargs or name is None:
            raise TypeError(f"numpy.{ufunc.__name__} (method {method!r}) of a Tensor: use nbgrad's "
                            "ops, or tensor.detach().numpy()")
        return OPS[name](*inputs)

    def __dlpack__(self, **kwargs: Any) -> Any:
        x = self.data
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        odd = any(s < 0 or (s == 0 and n > 1) for s, n in zip(x.strides, x.shape))
        if odd or not x.flags.writeable:
            x = x.copy()    # consumers write through read-only memory, abort on negative strides
        return x.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()

    def item(self) -> Any:
        """The one element as a Python number."""
        if self.data.size != 1:
            raise RuntimeError(f"a Tensor with {self.data.size} elements cannot be converted to "
                               "Scalar")
        return self.data.item()

    def tolist(self) -> Any:
        return self.data.tolist()

    def detach(self) -> Tensor:
        """The same memory, outside the graph."""
        out: Tensor = _wrap(self.data)
        _share_version(self, out)
        return out

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if not self.data.ndim else super().__format__(spec)

    def __bool__(self) -> bool:
        if self.data.size != 1:
            raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")
        return bool(self.data.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.dtype.kind not in "iu":
            raise TypeError("only integer tensors of a single element can be converted to an index")
        return int(self.item())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support "
                               "the deepcopy protocol at the moment; use detach()")
        out = _new(type(self))
        memo[id(self)] = out
        for name, value in vars(self).items():
            if name not in ("_hooks", "_retained", "_version", "grad", "data"):
                setattr(out, name, value)
        out.data = self.data.copy(order="K")
        out.grad = None if self.grad is None else self.grad.detach().clone()
        return out

    # the graph
    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Ask for gradients of this leaf, in place."""
        if requires_grad and self.dtype.kind != "f":
            raise RuntimeError("only Tensors of floating point dtype can require gradients, got "
                               f"{self.dtype}")
        if not requires_grad and not self.is_leaf:
            raise RuntimeError("you can only change requires_grad flags of leaf variables; use "
                               "detach()")
        self.requires_grad = requires_grad
        return self

    def backward(self, gradient: Any = None, retain_graph: bool | None = None,
                 create_graph: bool = False, inputs: Any = None) -> None:
        """Add ∂self/∂leaf, contracted with ``gradient`` (1 for a scalar), to the leaves' ``.grad``;
        with ``inputs`` (a Tensor or several) only to theirs.

        The graph is freed unless ``retain_graph`` (default: ``create_graph``); ``create_graph``
        records the gradients themselves. Raises RuntimeError on a second call without it, and if
        a tensor that is needed has been modified in place.
        """
        retain = create_graph if retain_graph is None else retain_graph
        dy = _cotangent(self, gradient, "backward")
        if self.grad_fn is None and gradient is not None and not create_graph:
            dy = _wrap(dy.data.copy())
        wanted = (inputs,) if isinstance(inputs, Tensor) else inputs
        targets = None if wanted is None else {x.grad_fn or x for x in wanted}
        found = _run((self,), (dy,), targets, retain=retain, record=create_graph)
        for x in wanted or ():
            if (x.grad_fn or x) in found:
                _accumulate(x, found[x.grad_fn or x], create_graph)

    def retain_grad(self) -> None:
        """Keep ``.grad`` of this non-leaf, too."""
        if not self.requires_grad:
            raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
        if self.grad_fn is None or self._retained is not None:
            return
        ref = weakref.ref(self)

        def keep(dy: Tensor) -> None:
            t = ref()
            if t is not None:
                t.grad = dy if t.grad is None else _add(t.grad, dy)
        self._retained = self.register_hook(keep)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Handle:
        """Call ``hook(dy)`` when this tensor's gradient is known; what it returns replaces dy."""
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        owner: Any = self.grad_fn or self
        name = "_hooks" if owner is self else "hooks"
        if getattr(owner, name) is None:
            setattr(owner, name, [])
        getattr(owner, name).append(hook)
        return Handle(getattr(owner, name), hook)

    # dtype
    def to(self, *args: Any, dtype: Any = None, device: Any = None) -> Tensor:
        """This tensor as another dtype (or that of another tensor); itself if it has it already.
        The one device is "cpu"."""
        for arg in args:
            if isinstance(arg, Tensor):
                dtype = arg.dtype
            elif isinstance(arg, str) and not hasattr(np, arg):
                device = arg
            else:
                dtype = arg
        check_device(device)
        if dtype is None:
            return self
        dtype = _dtype(dtype)
        y: Tensor = self if dtype == self.data.dtype else OPS["cast"](self, dtype=dtype)
        return y

    def cpu(self) -> Tensor:
        return self

    def float(self) -> Tensor:
        return self.to(np.float32)

    def double(self) -> Tensor:
        return self.to(np.float64)

    def long(self) -> Tensor:
        return self.to(np.int64)

    def int(self) -> Tensor:
        return self.to(np.int32)

    def bool(self) -> Tensor:
        return self.to(np.bool_)

    # in place
    def _write(self, new: Tensor, name: str) -> Tensor:
        """Take new's value and history."""
        if new.shape != self.shape:
            raise RuntimeError(f"{name}: output with shape {self.shape} doesn't match the "
                               f"broadcast shape {new.shape}")
        if not np.can_cast(new.dtype, self.dtype, "same_kind"):
            raise RuntimeError(f"{name}: result type {new.dtype} can't be cast to the desired "
                               f"output type {self.dtype}")
        if new.requires_grad:
            retained, self._retained = self._retained, None
            self.grad_fn, self.requires_grad = new.grad_fn, True
            if retained is not None:             # it follows the tensor to its new value
                retained.remove()
                self.retain_grad()
        elif _mode.recording and self.grad_fn is not None:     # nothing of the old value is left
            self.grad_fn, self.requires_grad = None, False
        np.copyto(self.data, new.data, casting="same_kind")
        bump(self)
        return self

    def _writable(self, name: str, *others: Any) -> None:
        """In-place writes are recorded on interior tensors that share memory with no other."""
        if not self.data.flags.writeable:
            raise RuntimeError(f"{name}: the tensor is a read-only array or an expanded view")
        if not _mode.recording:
            return
        if self.requires_grad and self.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place "
                               "operation.")
        grads = self.requires_grad or any(isinstance(o, Tensor) and o.requires_grad for o in others)
        seen = [r() for r in (self._version or ())[2:]]
        if grads and any(t is not None and t is not self for t in seen):
            raise RuntimeError(f"{name}: this tensor shares memory with a view, and an in-place "
                               "write that requires grad would not reach the other; use the "
                               "out-of-place op")

    def _in_place(self, name: str, *args: Any) -> Tensor:
        self._writable(name + "_", *args)
        return self._write(OPS[name](self, *args), name + "_")

    def add_(self, other: Any, alpha: Any = 1) -> Tensor:
        return self._in_place("add", other if alpha == 1 else other * alpha)

    def sub_(self, other: Any, alpha: Any = 1) -> Tensor:
        return self._in_place("sub", other if alpha == 1 else other * alpha)

    def mul_(self, other: Any) -> Tensor:
        return self._in_place("mul", other)

    def div_(self, other: Any) -> Tensor:
        return self._in_place("div", other)

    def clamp_(self, min: Any = None, max: Any = None) -> Tensor:
        self._writable("clamp_", min, max)
        x = OPS["clone"](self) if _mode.recording else self     # the vjp looks at what x was
        return self._write(OPS["clamp"](x, min, max), "clamp_")

    def zero_(self) -> Tensor:
        return self.fill_(0)

    def fill_(self, value: Any) -> Tensor:
        self._writable("fill_", value)
        self.data.fill(value.item() if isinstance(value, Tensor) else value)
        bump(self)
        if self.grad_fn is not None:
            self.grad_fn, self.requires_grad = None, False
        return self

    def copy_(self, src: Any) -> Tensor:
        self._writable("copy_", src)
        src = src if isinstance(src, Tensor) else as_tensor(src)
        src = src.to(self.dtype)
        if src.shape != self.shape:
            src = OPS["broadcast_to"](src, shape=self.shape)
        return self._write(src, "copy_")

    def __setitem__(self, index: Any, value: Any) -> None:
        self._writable("__setitem__", value)
        recorded = _mode.recording and (
            self.requires_grad or (isinstance(value, Tensor) and value.requires_grad))
        if recorded:
            value = value if isinstance(value, Tensor) else _constant(value, self, "__setitem__")
            self._write(OPS["index_put"](self, value, index=index), "__setitem__")
        else:
            index = tuple(map(_plain, index)) if isinstance(index, tuple) else _plain(index)
            self.data[index] = _plain(value)
            bump(self)

    # operators
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[Tensor]:
        if not self.data.ndim:
            raise TypeError("iteration over a 0-d tensor")
        return (self[i] for i in range(len(self.data)))

    @property
    def T(self) -> Tensor:
        y: Tensor = OPS["permute"](self, dims=tuple(range(self.ndim))[::-1])
        return y

    @property
    def mT(self) -> Tensor:
        y: Tensor = OPS["transpose"](self, -2, -1)
        return y


REMAKE_BYTES = 1 << 20      # a smaller value costs less to keep than to make again


class Remade(Tensor):
    """What a vjp holds of a value that is not kept: its op makes it again when it is asked for."""

    def __init__(self, x: Tensor, remake: Callable[[], Array], sources: list[Tensor]) -> None:
        self.remake, self.sources = remake, sources
        self.requires_grad, self.grad_fn = x.requires_grad, x.grad_fn
        self._shape, self._dtype = x.data.shape, x.data.dtype

    @property
    def data(self) -> Array:  # type: ignore[override]
        return self.remake()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def _version(self) -> list[Any] | None:  # type: ignore[override]
        """Of what it is made from: the last in-place write to any of them."""
        clocks = [s._version[0] for s in self.sources if s._version is not None]
        return [max(clocks)] if clocks else None


def kept(x: Tensor) -> Tensor:
    """x, for a vjp to hold: itself, or what makes it again from what its own op keeps anyway, where
    that op's vjp has a function ``remake``.

    A ReLU behind a batch norm is one pass over memory, and its value is as large as the rest that
    the layer keeps. Values that have been written to in place, or whose sources have, are held
    themselves; a later write to a source raises at backward. (Writes to ``x.data``, which nothing
    counts, do not reach what is made again.)
    """
    node = x.grad_fn
    remake = getattr(node.vjp, "remake", None) if node is not None else None
    if remake is None or x._version is not None or x.data.nbytes < REMAKE_BYTES:
        return x
    cells = [cell.cell_contents for cell in remake.__closure__]
    sources = [value for value in cells if isinstance(value, Tensor)]
    if any(s._version is not None and s._version[0] > node.clock for s in sources):  # type: ignore[union-attr]
        return x
    return Remade(x, remake, sources)


def _plain(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


def _operator(name: str, reverse: bool = False) -> Any:
    """A method for Python's operator. Ops are filed after Tensor: its own is found at first use."""
    op: Any = None

    def forward(self: Tensor, other: Any) -> Any:
        nonlocal op
        if isinstance(other, _OPERANDS):
            if op is None:
                op = OPS[name]
            return op(self, other)
        return NotImplemented

    def backward(self: Tensor, other: Any) -> Any:
        return OPS[name](other, self) if isinstance(other, _OPERANDS) else NotImplemented
    return backward if reverse else forward


_OPERANDS = (Tensor, int, float, bool, ndarray, np.generic, list, tuple)
_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow",
           "matmul": "matmul", "floordiv": "floor_divide", "mod": "remainder",
           "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
for _python, _name in _BINARY.items():
    setattr(Tensor, f"__{_python}__", _operator(_name))
    setattr(Tensor, f"__r{_python}__", _operator(_name, reverse=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tensor, f"__{_name}__", _operator(_name))
for _name in ("add", "sub", "mul", "div"):         # x += y writes to x's memory, as in PyTorch
    _python = "truediv" if _name == "div" else _name
    setattr(Tensor, f"__i{_python}__", getattr(Tensor, _name + "_"))
for _python, _name in {"neg": "neg", "abs": "abs", "invert": "bitwise_not"}.items():
    setattr(Tensor, f"__{_python}__", lambda self, _name=_name: OPS[_name](self))
Tensor.__getitem__ = lambda self, index: OPS["getitem"](self, index=index)  # type: ignore[method-assign]

_UFUNCS = {"add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "power": "pow",
           "matmul": "matmul", "negative": "neg", "absolute": "abs", "exp": "exp", "log": "log",
           "log1p": "log1p", "expm1": "expm1", "sqrt": "sqrt", "square": "square", "sin": "sin",
           "cos": "cos", "tanh": "tanh", "maximum": "maximum", "minimum": "minimum", "sign": "sign",
           "reciprocal": "reciprocal", "equal": "eq", "not_equal": "ne", "less": "lt",
           "less_equal": "le", "greater": "gt", "greater_equal": "ge"}


# ----------------------------------------------------------------------------------------- creation

# One object per dtype, so that ops can compare dtypes with `is`.
_DTYPES = {d: d for d in map(np.dtype, ["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8",
                                        "?"])}


def _dtype(dtype: Any) -> np.dtype[Any]:
    """A supported dtype; Python's float is float32 and int is int64, as in PyTorch."""
    dtype = np.dtype(np.float32) if dtype is float else np.dtype(dtype).newbyteorder("=")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype {dtype} is not supported: use float32, float64, an integer or bool")
    return _DTYPES[dtype]


def _array(data: Any, dtype: Any = None, copy: bool | None = None) -> Array:
    if isinstance(data, Tensor):
        data = data.data
    typed = isinstance(data, (ndarray, np.generic)) or hasattr(data, "__array_interface__")
    try:
        array = np.asarray(data)
    except ValueError as e:
        raise ValueError(f"tensor: expected a rectangular array of numbers: {e}") from None
    if dtype is None:
        dtype = np.float32 if array.dtype == np.float64 and not typed else array.dtype
    if array.dtype.kind not in "fiub":
        raise TypeError(f"tensor: expected numbers or bools, got {type(data).__name__} of dtype "
                        f"{array.dtype}")
    dtype = _dtype(dtype)
    fit = array.dtype is dtype and array.flags.aligned     # kernels are compiled for aligned memory
    return np.array(array, dtype, order="K", copy=copy if fit else True)


def check_device(device: Any) -> None:
    """Raise RuntimeError unless it is None or "cpu", the one device there is."""
    if device is not None and str(device) != "cpu":
        raise RuntimeError(f"device {device!r} is not there: the one device is 'cpu'")


def tensor(data: Any, dtype: Any = None, requires_grad: bool = False, *,
           device: Any = None) -> Tensor:
    """A new Tensor that owns a copy of ``data``.

    Python floats become float32, arrays keep their dtype. Raises TypeError for what is no number,
    ValueError for ragged lists.

    >>> from nbgrad import tensor
    >>> tensor([[1, 2], [3, 4]])
    tensor([[1, 2],
            [3, 4]])
    """
    check_device(device)
    return Tensor(data, dtype, requires_grad)


def as_tensor(data: Any, dtype: Any = None) -> Tensor:
    """A Tensor that shares ``data``'s memory where it can; itself if it is one of that dtype."""
    if isinstance(data, Tensor):
        return data if dtype is None else data.to(dtype)
    return _wrap(_array(data, dtype))
