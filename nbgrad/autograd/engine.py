"""Backward: cotangents are carried from the roots of a graph to its leaves, node by node.

``propagate`` counts for everything reachable how many cotangents will arrive there, and runs a
node's vjp once all have; no call is deeper than one vjp, however long the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy import ndarray

from . import versions
from .mode import set_grad_enabled
from .node import OPS, Node, Part
from .saved import check_unmodified
from .tensors import Tensor, wrap

__all__ = ["accumulate", "propagate"]

_USED = ("Trying to backward through the graph a second time (or directly access saved tensors "
         "after they have already been freed). Specify retain_graph=True if you need to backward "
         "through the graph a second time.")


def propagate(roots: Sequence[Tensor], dys: Sequence[Tensor], targets: set[Any] | None, *,
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
                accumulate(x, dx, record)
    return found


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


def _pull(node: Node, dy: Any, retain: bool) -> Sequence[Any]:
    """The vjp of one node: cotangents of its inputs."""
    vjp = node.vjp
    if vjp is None:
        raise RuntimeError(_USED)
    if isinstance(node, Part):
        return (dy,)
    if node.clock != versions.clock:
        check_unmodified(node)
    if node.output is not None:
        y = wrap(node.output.data)
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
    if isinstance(node, Part):                       # slot i of a node that has several outputs
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
    return wrap(dx.data.copy(order="K")) if shared or others > 1 else dx


def accumulate(leaf: Tensor, dy: Tensor, record: bool) -> None:
    if leaf.grad is None:
        leaf.grad = dy
    elif record:
        leaf.grad = _add(leaf.grad, dy)
    else:
        leaf.grad.data = leaf.grad.data + dy.data
        versions.bump(leaf.grad)
