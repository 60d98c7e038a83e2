"""Reading files that may be damaged or hostile: every size is known before it is allocated."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import numpy.typing as npt

Path_ = str | os.PathLike[str]
MAX_BYTES = 1 << 28  # 256 MiB; MNIST's largest file holds 47 MB, CIFAR-10's 31 MB
_DEFLATE_RATIO = 1032  # the most that deflate expands (zlib's technical details)


class DataError(ValueError):
    """A dataset file is corrupt, truncated, oversized or not what its header says.

    The message starts with the path of the file.
    """

    def __init__(self, path: Path_, problem: str) -> None:
        super().__init__(os.fspath(path), problem)

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


def find(root: Path_, names: Sequence[str], suffixes: Sequence[str] = ("",)) -> list[Path | None]:
    """The path of each name in root, with the first suffix that is there; None where none is."""
    return [
        next((path for path in (Path(root, name + end) for end in suffixes) if path.exists()), None)
        for name in names
    ]


def missing(what: str, root: Path_, names: Sequence[str], hint: str) -> FileNotFoundError:
    """The error for files of a dataset that are not there."""
    place = "in" if Path(root).is_dir() else "in (not a folder)"
    return FileNotFoundError(
        f"{what}: missing {', '.join(names)} {place} {os.fspath(root)!r}; {hint}"
    )


def regular_size(path: Path_, max_bytes: int) -> int:
    """The size of a file. Raises DataError if it is above the limit or not a regular file."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # reading a FIFO or a device need never end
        raise DataError(path, "is not a regular file")
    if info.st_size > max_bytes:
        raise DataError(path, f"holds {info.st_size} bytes, more than the limit of {max_bytes}")
    return info.st_size


@contextmanager
def unpacked(path: Path_, max_bytes: int) -> Iterator[tuple[BufferedIOBase, int]]:
    """The file, decompressed if it starts as gzip does, and the most bytes that can come out of it.

    What goes wrong in the block (bad checksum, bad deflate data, early end) raises DataError.
    """
    size = regular_size(path, max_bytes)
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not packed:
            yield raw, size
            return
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, size * _DEFLATE_RATIO
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DataError(path, f"damaged gzip data ({error})") from error


def read_exactly(stream: BufferedIOBase, count: int, path: Path_) -> npt.NDArray[np.uint8]:
    """The last `count` bytes of a stream. Reads one more, to see the end (and gzip's checksum).

    Raises:
        DataError: the stream is shorter or longer.
    """
    data, done = np.empty(count, np.uint8), 0
    while done < count:
        got = stream.readinto(data[done : done + (1 << 20)].data)
        if not got:
            raise DataError(path, f"truncated: {count} bytes of data expected, {done} found")
        done += got
    if stream.read(1):
        raise DataError(path, f"oversized: data goes on after the {count} bytes expected")
    return data
