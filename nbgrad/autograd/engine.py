"""Backward: cotangents are carried from the roots of a graph to its leaves, node by node.

``propagate`` counts for everything reachable how many cotangents will arrive there, and runs a
node's vjp once all have; no call is deeper than one vjp, however long the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.backend import capturing, is_array

from . import versions
from .mode import state
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
    nodes = [r.grad_fn for r in roots if r.grad_fn is not None]
    pending = _pending(nodes, targets if stop and targets else set())
    needed = None
    if targets is not None:
        needed = pending.keys() - targets if stop else _leading_to(targets, nodes, pending)
    dy_of: dict[Any, Any] = {}
    for source, dy in zip(sources, dys):
        before = dy_of.get(source)
        dy_of[source] = dy if before is None else OPS["add"](before, dy)
    outside, state.recording = state.recording, record
    try:
        found = _visit(nodes, pending, dy_of, targets, needed, retain)
        for x, dy in dy_of.items():                # only leaves are left
            if x._hooks:
                dy = _hooked(x._hooks, dy, x)
            if targets is None or x in targets:
                found[x] = dy
        if targets is None:               # last: an error on the way leaves every .grad as it was
            for x, dx in found.items():
                accumulate(x, dx, record)
    finally:
        state.recording = outside
    return found


def _visit(roots: Sequence[Node], pending: dict[Any, int], dy_of: dict[Any, Any],
           targets: set[Any] | None, needed: set[Any] | None, retain: bool) -> dict[Any, Tensor]:
    """Run the vjp of each needed node once its cotangent is complete; ``dy_of`` keeps those of the
    leaves. Returns those of the nodes among the targets."""
    found: dict[Any, Tensor] = {}
    recording = state.recording
    wanted = None if needed is None or targets is None else needed | targets
    ready: list[Any] = [r for r in dict.fromkeys(roots) if not pending[r]]
    while ready:
        node = ready.pop()
        dy = dy_of.pop(node, None)
        if dy is not None:
            if node.hooks:
                dy = _hooked(node.hooks, dy, node)
            if targets is not None and node in targets:
                found[node] = dy
        if needed is not None and node not in needed:
            continue                               # nor is anything behind it
        edges = node.edges
        dxs = (None,) * len(edges) if dy is None else _pull(node, dy, retain)
        taken = {id(dy)}
        for edge, dx in zip(edges, dxs):
            if edge is None:
                continue
            left = pending.get(edge)               # None: a leaf
            if dx is not None and (wanted is None or edge in wanted):
                leaf = left is None
                if leaf and not recording and (id(dx) in taken or (
                        dx.data.base is not None and is_array(dx.data.base))):
                    # it keeps its gradient, and users scale it in place
                    dx = wrap(dx.data.copy(order="K"))
                taken.add(id(dx))
                shape = edge.data.shape if leaf else edge.shape
                if edge not in dy_of and dx.data.shape == shape:
                    dy_of[edge] = dx
                else:
                    _deliver(dy_of, edge, dx, node)
            if left == 1:
                ready.append(edge)
            elif left is not None:
                pending[edge] = left - 1
    return found


def _pending(roots: Sequence[Node], ends: set[Any]) -> dict[Any, int]:
    """For every node that is reached: how many cotangents will arrive there."""
    pending: dict[Any, int] = dict.fromkeys(roots, 0)
    stack = list(pending)
    while stack:
        node = stack.pop()
        if node in ends:
            continue
        for edge in node.edges:
            if edge in pending:
                pending[edge] += 1
            elif isinstance(edge, Node):
                pending[edge] = 1
                stack.append(edge)
    return pending


def _leading_to(targets: set[Any], roots: Sequence[Node], pending: dict[Any, int]) -> set[Any]:
    """The nodes from which a target can be reached; a target only if another lies behind it."""
    left, order = dict(pending), []
    ready: list[Any] = [r for r in dict.fromkeys(roots) if not pending[r]]
    while ready:
        node = ready.pop()
        order.append(node)
        for edge in node.edges:
            if edge in left:
                left[edge] -= 1
                if not left[edge]:
                    ready.append(edge)
    needed: set[Any] = set()
    for node in reversed(order):
        if any(edge in targets or edge in needed for edge in node.edges):
            needed.add(node)
    return needed


def _pull(node: Node, dy: Any, retain: bool) -> Sequence[Any]:
    """The vjp of one node: cotangents of its inputs."""
    vjp: Any = node.vjp
    if vjp is None:
        raise RuntimeError(_USED)
    if type(node) is Part:
        return (dy,)
    if node.clock != versions.clock:
        check_unmodified(node)
    args: Sequence[Any] = dy if type(dy) is list else (dy,)
    if node.output is not None:
        args = dy, (_linked(node) if state.recording else node.output)
    if type(vjp) is not tuple and type(vjp) is not list:
        dxs: Any = vjp(*args)
        if type(dxs) is not tuple and type(dxs) is not list:
            dxs = (dxs,)
    elif len(vjp) == 1:
        dxs = (vjp[0](*args),)
    else:
        dxs = [f(*args) if f is not None else None for f in vjp]
    if not retain:
        node.vjp = None
        if node.output is not None:
            node.output = None
    return dxs  # type: ignore[no-any-return]


def _linked(node: Node) -> Tensor:
    """The node's value, in the graph where the node stands."""
    y = wrap(node.output.data)                     # type: ignore[union-attr]
    y.requires_grad, y.grad_fn = True, node
    return y


def _deliver(dy_of: dict[Any, Any], edge: Any, dx: Tensor, node: Node) -> None:
    if isinstance(node, Part):                       # slot i of a node that has several outputs
        slots = dy_of.setdefault(edge, [None] * len(edge.shape))
        before = slots[node.clock]
        slots[node.clock] = dx if before is None else OPS["add"](before, dx)
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


def accumulate(leaf: Tensor, dy: Tensor, record: bool) -> None:
    if leaf.grad is None:
        leaf.grad = dy
    elif record:
        leaf.grad = leaf.grad + dy
    else:
        if capturing():              # a graph has one address for it
            np.add(leaf.grad.data, dy.data, leaf.grad.data)
        else:
            leaf.grad.data = leaf.grad.data + dy.data
        versions.bump(leaf.grad)
