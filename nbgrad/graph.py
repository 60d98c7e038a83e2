"""Read a recorded graph: print it as a program, draw it, count what it keeps alive."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from nbgrad.autograd import Node, Part, Remade, Tensor, saved_tensors

__all__ = ["dot", "nodes", "saved", "saved_bytes", "show", "text"]


def nodes(t: Tensor) -> list[Node]:
    """The nodes that ``t`` was computed by, inputs before what uses them."""
    order: list[Node] = []
    if t.grad_fn is None:
        return order
    seen: set[Any] = set()
    stack: list[tuple[Node, bool]] = [(t.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(e, False) for e in reversed(node.edges)
                      if isinstance(e, Node) and e not in seen]
    return order


def saved(node: Node) -> Iterator[tuple[str, Any]]:
    """Names and arrays that the node's vjp keeps alive."""
    for name, value in saved_tensors(node):
        if not isinstance(value, Remade):
            yield name, value.data if isinstance(value, Tensor) else value


def _memory(array: Any) -> tuple[int, int]:
    """Where an array's elements start, and how many bytes they are: what two views share."""
    return array.__array_interface__["data"][0], array.nbytes


def saved_bytes(t: Tensor) -> int:
    """Bytes that the graph behind ``t`` keeps alive, each buffer once (parameters included)."""
    kept = {_memory(a) for node in nodes(t) for _, a in saved(node)}
    return sum(nbytes for _, nbytes in kept)


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


def _type(shape: Any, dtype: Any) -> str:
    return f"{np.dtype(dtype).name}[{', '.join(map(str, shape))}]"


def _setting(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return _type(value.shape, value.dtype)
    return f"{value:g}" if isinstance(value, float) else repr(value)


class _Names:
    """%1, %2 … for nodes, the given names or a, b … for leaves."""

    def __init__(self, given: Mapping[str, Tensor] | None) -> None:
        self.names: dict[int, str] = {id(t): name for name, t in (given or {}).items()}
        self.leaves: list[Tensor] = []
        self.count = 0

    def node(self, node: Node) -> str:
        if isinstance(node, Part):
            return f"{self.node(node.edges[0])}.{node.clock}"       # type: ignore[arg-type]
        if id(node) not in self.names:
            self.count += 1
            self.names[id(node)] = f"%{self.count}"
        return self.names[id(node)]

    def edge(self, edge: Any) -> str:
        if edge is None:
            return "_"
        if isinstance(edge, Node):
            return self.node(edge)
        if all(edge is not leaf for leaf in self.leaves):
            self.leaves.append(edge)
            self.names.setdefault(id(edge), f"leaf{len(self.leaves)}")
        return self.names[id(edge)]


def _line(node: Node, names: _Names) -> str:
    arguments = [names.edge(e) for e in node.edges]
    arguments += [f"{k}={_setting(v)}" for k, v in node.settings.items() if v is not None]
    parts = node.shape and isinstance(node.shape[0], tuple)
    shapes = node.shape if parts else (node.shape,)
    shape = ", ".join(_type(s, node.dtype) for s in shapes)
    kept = [f"{name} {_size(a.nbytes)}" for name, a in saved(node)]
    kept += [f"{name} made again" for name, t in saved_tensors(node) if isinstance(t, Remade)]
    kept_text = "freed" if node.vjp is None else "keeps " + ", ".join(kept) if kept else ""
    return (f"{names.node(node)}: {shape} = {node.name}({', '.join(arguments)})"
            + (f"    {kept_text}" if kept_text else ""))


def text(t: Tensor, names: Mapping[str, Tensor] | None = None) -> str:
    """The graph behind ``t`` as a program, its leaves named by ``names`` (say
    ``dict(model.named_parameters())``).

    >>> import nbgrad
    >>> x = nbgrad.ones(2, 3, requires_grad=True)
    >>> print(text((x * x).sum(), {"x": x}))
    x: float32[2, 3]
    %1: float32[2, 3] = mul(x, x)    keeps b 24 B
    %2: float32[] = sum(%1)
    keeps 24 B alive in 2 nodes
    """
    table, order = _Names(names), [n for n in nodes(t) if not isinstance(n, Part)]
    lines = [_line(node, table) for node in order]
    leaves = [f"{table.edge(leaf)}: {_type(leaf.shape, leaf.dtype)}" for leaf in table.leaves]
    total = f"keeps {_size(saved_bytes(t))} alive in {len(order)} nodes"
    if any(edge is None for node in order for edge in node.edges):
        leaves.insert(0, "_: an input that needs no gradient")
    return "\n".join([*leaves, *lines, total])


def show(t: Tensor, names: Mapping[str, Tensor] | None = None, file: TextIO | None = None) -> None:
    """Print ``text(t, names)``: one line per node with type, inputs, settings and what it keeps
    alive. ``_`` is an input that needs no gradient."""
    (file or sys.stdout).write(text(t, names) + "\n")


def dot(t: Tensor, names: Mapping[str, Tensor] | None = None) -> str:
    """The graph behind ``t`` in Graphviz' language."""
    table = _Names(names)
    lines = ["digraph {", "  rankdir=TB; node [shape=box, fontname=monospace];"]
    for node in nodes(t):
        name = table.node(node)
        lines.append(f'  "{name}" [label="{name} {node.name}\\n{node.shape}"];')
        lines += [f'  "{table.edge(e)}" -> "{name}";' for e in node.edges if e is not None]
    lines += [f'  "{table.edge(leaf)}" [label="{table.edge(leaf)}\\n{leaf.shape}", style=rounded];'
              for leaf in table.leaves]
    return "\n".join([*lines, "}"])
