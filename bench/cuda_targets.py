"""What the kernels should reach on an H200-class GPU, beside what a run has found.

``of_copy`` and ``of_torch`` as in cuda_measure.py. A target is met if every case of it is.
"""

import re
from typing import NamedTuple

__all__ = ["TARGETS", "Target", "judged", "table"]


class Target(NamedTuple):
    """Cases by a pattern of their names, the column of the ratio, and the least that it should be.
    """

    what: str
    pattern: str
    column: str
    least: float


_SHAPE, _CONV = r"\d+x\d+x\d+x\d+", r"conv2d(_input|_weight)? .*@\d+"
TARGETS = [
    Target("batch norm forward, of copy", rf"batch_norm forward {_SHAPE} [\w-]+", "of_copy", 0.85),
    Target("  forward, NCHW, of PyTorch", rf"batch_norm forward {_SHAPE} NCHW", "of_torch", 1.5),
    Target("  forward, channels-last, of PyTorch", rf"batch_norm forward {_SHAPE} channels-last",
           "of_torch", 1.0),
    Target("batch norm backward, of copy", rf"batch_norm backward {_SHAPE} [\w-]+", "of_copy", 0.8),
    Target("  backward, NCHW, of PyTorch", rf"batch_norm backward {_SHAPE} NCHW", "of_torch", 1.3),
    Target("with add and ReLU, of copy", rf"batch_norm \+ add \+ relu \w+ {_SHAPE} [\w-]+",
           "of_copy", 0.8),
    Target("  of PyTorch's three ops", rf"batch_norm \+ add \+ relu \w+ {_SHAPE} [\w-]+",
           "of_torch", 2.0),
    *(Target(f"{name.replace('_', ' ')}, of copy", rf"{name} forward \d+x\d+", "of_copy", 0.85)
      for name in ("layer_norm", "rms_norm", "softmax")),
    Target("matmul, float32, of cuBLAS", r"matmul \S+ fma", "of_torch", 0.8),
    Target("  TF32", r"matmul \S+ tf32", "of_torch", 0.5),
    Target("  bfloat16", r"matmul \S+ bf", "of_torch", 0.5),
    Target("  3xTF32, of cuBLAS float32", r"matmul \S+ 3xtf32", "of_torch", 1.0),
    Target("convolution, TF32 off, of cuDNN", _CONV, "of_torch", 0.8),
    Target("  TF32 on", _CONV + " tf32", "of_torch", 0.5),
    Target("ResNet-20 step, captured, of PyTorch", r"resnet20 step, batch \d+, captured",
           "of_torch", 1.0)]


def judged(rows, target):
    """The least ratio and its case, and how many cases there are; None if none was measured."""
    found = [(float(row[target.column]), row["case"]) for row in rows
             if row["part"] == "measure" and row["status"] == "ok" and row[target.column]
             and re.fullmatch(target.pattern, row["case"])]
    return (*min(found), len(found)) if found else None


def table(rows):
    """Lines of text: each target, the worst of its cases, and whether it is met."""
    lines = [f"{'target':38s} {'least':>5s} {'found':>6s}        worst of its cases"]
    for target in TARGETS:
        worst = judged(rows, target)
        if worst is None:
            lines.append(f"{target.what:38s} {target.least:5.2f} {'':>6s}        not measured")
        else:
            value, case, n = worst
            lines.append(f"{target.what:38s} {target.least:5.2f} {value:6.2f} "
                         f"{'met   ' if value >= target.least else 'missed'} {case} (of {n})")
    return "\n".join(lines)
