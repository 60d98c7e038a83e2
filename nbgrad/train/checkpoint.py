"""Checkpoints: one safetensors file with everything that a run needs to go on.

A state is a tree of dicts, lists, tuples, numbers, strings, arrays and Tensors. Its arrays become
the file's tensors; the rest becomes JSON text in the file's header, with a checksum over both.
Nothing in a file is ever executed. A file is written beside its final name, synced and renamed, so
that after a crash the name holds either the old checkpoint or the new one, whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from nbgrad.autograd import Tensor, as_tensor

__all__ = ["CheckpointError", "load", "remove_stale", "save"]

FORMAT = "nbgrad-checkpoint-1"
_MAX_HEADER = 1 << 24       # resnet20 with its optimiser and 300 epochs of history needs 40 KB
_TEMPORARY = re.compile(r"\.[^/]+\.safetensors\.\d+\.tmp")
_MARKS = {"$array", "$tensor", "$tuple", "$dict"}


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or does not fit the model it is loaded into."""


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Write ``state`` to ``path``; a crash at any moment leaves the previous file whole.

    Arrays keep dtype, shape (also 0-d and empty) and bits. Raises TypeError for a value that a
    checkpoint cannot hold, OSError where the disk refuses; the old file stays in both cases.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    text = json.dumps(_encode(state, arrays, ""), separators=(",", ":"))
    blob = serialize(arrays, {"format": FORMAT, "state": text, "crc32": _checksum(text, arrays)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that ``save`` wrote to ``path``.

    Memory is bounded by the size of the file. Raises FileNotFoundError, or CheckpointError for
    anything but an undamaged checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    _check_header(path)
    try:
        with safe_open(path, framework="numpy") as f:
            header = f.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a checkpoint of this version of nbgrad")
            arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
        if _checksum(header["state"], arrays) != header["crc32"]:
            raise CheckpointError(f"{path}: the checksum does not match, the file is damaged")
        state = _decode(json.loads(header["state"]), arrays)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            OverflowError, RecursionError, MemoryError) as e:
        raise CheckpointError(f"{path}: not a readable checkpoint ({_line(e)})") from e
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a readable checkpoint (no dictionary inside)")
    return state


def checked(progress: dict[str, Any], batches: int) -> dict[str, Any]:
    """Where a run stands, its epochs having ``batches`` batches; raises ValueError if no run can
    stand there."""
    for name, most in (("epoch", 2**63), ("batch", batches), ("step", 2**63)):
        n = progress[name]
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= most:
            raise ValueError(f"progress: expected {name} from 0 to {most}, got {str(n)[:20]}")
    best, sums = float(progress["best"]), {k: float(v) for k, v in progress["sums"].items()}
    if math.isnan(best) or not all(map(math.isfinite, sums.values())):
        raise ValueError("progress: best or sums are not finite")
    return {**progress, "best": best, "sums": sums, "diverged": bool(progress["diverged"])}


def columns(history: dict[str, Any], epochs: int, metrics: set[str]) -> dict[str, list[float]]:
    """A history as lists; raises ValueError unless all have ``epochs`` numbers and, after the first
    epoch, all metrics are there."""
    missing = metrics - history.keys() if epochs else set()
    if missing:
        raise ValueError(f"history: no {', '.join(sorted(missing))}")
    for name, column in history.items():
        if column.shape != (epochs,) or column.dtype.kind not in "iuf":
            raise ValueError(f"history: expected {epochs} numbers of {name}, got {column.dtype} of "
                             f"shape {column.shape}")
    return {name: column.tolist() for name, column in history.items()}


def remove_stale(folder: str | os.PathLike[str]) -> None:
    """Delete what saves that were killed half-way have left in ``folder``."""
    for entry in Path(folder).iterdir():
        if _TEMPORARY.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def _check_header(path: Path) -> None:
    """The first 8 bytes announce the header's length: refuse what the file cannot hold."""
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
    if size < 10 or length > size - 8:
        raise CheckpointError(f"{path}: not a checkpoint, or cut off ({size} bytes)")
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path}: a header of {length} bytes; at most {_MAX_HEADER} are read")


def _sync_folder(folder: Path) -> None:
    """The rename itself lives in the folder: without this a power cut may undo it."""
    if not hasattr(os, "O_DIRECTORY"):      # Windows has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(text: str, arrays: dict[str, np.ndarray[Any, Any]]) -> str:
    """CRC-32 over the text and every array's name, dtype, shape and bytes."""
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        a = arrays[name]
        crc = zlib.crc32(f"{name} {a.dtype} {a.shape}".encode(), crc)
        crc = zlib.crc32(a.reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _encode(x: Any, arrays: dict[str, np.ndarray[Any, Any]], where: str) -> Any:
    if isinstance(x, Tensor | np.ndarray):
        data = x.data if isinstance(x, Tensor) else x
        while where in arrays or where == "__metadata__":   # {"a.b": x, "a": {"b": y}}
            where += "_"
        # safetensors writes the raw buffer: a transposed array would come back scrambled.
        arrays[where] = np.asarray(data, dtype=data.dtype.newbyteorder("="), order="C")
        return {"$tensor" if isinstance(x, Tensor) else "$array": where}
    if isinstance(x, dict):
        if all(isinstance(k, str) for k in x) and not _MARKS & x.keys():
            return {k: _encode(v, arrays, f"{where}.{k}" if where else k) for k, v in x.items()}
        return {"$dict": [[_encode(k, arrays, where), _encode(v, arrays, f"{where}.{k}")]
                          for k, v in x.items()]}
    if isinstance(x, list | tuple):
        items = [_encode(v, arrays, f"{where}.{i}") for i, v in enumerate(x)]
        return items if isinstance(x, list) else {"$tuple": items}
    if isinstance(x, np.generic):
        return x.item()
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise TypeError(f"checkpoint: {where} is a {type(x).__name__}; a checkpoint holds numbers, "
                    "strings, lists, tuples, dictionaries, arrays and Tensors")


def _decode(x: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(x, list):
        return [_decode(v, arrays) for v in x]
    if not isinstance(x, dict):
        return x
    if "$tensor" in x:
        return as_tensor(arrays[x["$tensor"]])
    if "$array" in x:
        return arrays[x["$array"]]
    if "$tuple" in x:
        return tuple(_decode(v, arrays) for v in x["$tuple"])
    if "$dict" in x:
        return {_decode(k, arrays): _decode(v, arrays) for k, v in x["$dict"]}
    return {k: _decode(v, arrays) for k, v in x.items()}


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__
