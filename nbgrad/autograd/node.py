"""What a graph is made of: a Node per recorded op, with edges to where its inputs came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recording import Op
    from .tensors import Tensor

__all__ = ["OPS", "Node", "Part"]

OPS: dict[str, Op] = {}            # every op by name: Tensor's methods, the tests and docs read it


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


class Part(Node):
    """One of the outputs of a Node that has several; ``clock`` is its number."""
