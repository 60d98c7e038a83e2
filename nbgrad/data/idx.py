"""IDX files (LeCun, Cortes & Burges 1998), and MNIST and Fashion-MNIST in them."""

from __future__ import annotations

import math
import struct
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nbgrad.autograd import as_tensor
from nbgrad.data.dataset import TensorDataset
from nbgrad.data.files import MAX_BYTES, DataError, Path_, find, missing, read_exactly, unpacked
from nbgrad.data.prepare import check_labels, every_fifth, scaled

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_ENOUGH = "each may end in .gz, the t10k pair alone is enough; nbgrad does not download"
HINTS = {
    "mnist": f"from https://ossci-datasets.s3.amazonaws.com/mnist/ ({_ENOUGH})",
    "fashion_mnist": f"from https://github.com/zalandoresearch/fashion-mnist ({_ENOUGH})",
}


def read_idx(path: Path_, *, max_bytes: int = MAX_BYTES) -> npt.NDArray[Any]:
    """The array of an IDX file, plain or gzip (told by content, not by name), in native byte order.

    The header gives two zero bytes, a dtype code, the number of dimensions (1 to 8) and each
    dimension as a big-endian int32. The data must be exactly as long as the header says: a gzip
    bomb is refused one byte after that, a header too large for its file before any allocation.

    Raises:
        DataError: anything else, or more than `max_bytes` of file or of data.
        FileNotFoundError: there is no such file.
    """
    with unpacked(path, max_bytes) as (stream, most):
        dtype, shape = _header(stream, path)
        count = dtype.itemsize * math.prod(shape)
        # NumPy refuses (0, 2³¹ − 1, 2³¹ − 1), though it holds nothing: count without the zeros
        extent = dtype.itemsize * math.prod(n or 1 for n in shape)
        if extent > max_bytes:
            raise DataError(path, f"shape {shape} needs {extent} bytes, the limit is {max_bytes}")
        if count > most:
            raise DataError(path, f"truncated: shape {shape} needs {count} bytes of data")
        data = read_exactly(stream, count, path)
    return data.view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _header(stream: BufferedIOBase, path: Path_) -> tuple[np.dtype[Any], tuple[int, ...]]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(path, f"not an IDX file (first bytes {magic.hex(' ') or 'missing'})")
    code, ndim = magic[2], magic[3]
    if code not in _DTYPES:
        raise DataError(path, f"unknown IDX dtype code 0x{code:02x}")
    if not 1 <= ndim <= 8:
        raise DataError(path, f"{ndim} dimensions, an IDX file here has 1 to 8")
    dims = stream.read(4 * ndim)
    if len(dims) < 4 * ndim:
        raise DataError(path, f"truncated: the header ends before its {ndim} dimensions")
    shape = struct.unpack(f">{ndim}i", dims)
    if min(shape) < 0:
        raise DataError(path, f"negative dimension in shape {shape}")
    return np.dtype(_DTYPES[code]), shape


def mnist(root: Path_, split: str = "train") -> TensorDataset:
    """MNIST (LeCun et al. 1998): images float32 (N, 1, 28, 28) in 0..1, labels int64 (N,).

    Files in `root`: train-images-idx3-ubyte, train-labels-idx1-ubyte and the same with t10k, plain
    or .gz.
    Where the folder has only the t10k pair, both splits come from it: of the images sorted by label
    (stably) every fifth is "test" (2,000), the others are "train" (8,000), in the file's order.

    Raises:
        FileNotFoundError: naming the files looked for.
        DataError: a damaged file, other sizes than 28 × 28, labels outside 0..9, unequal counts.
        ValueError: a split other than "train" and "test".
    """
    return _images("mnist", root, split)


def fashion_mnist(root: Path_, split: str = "train") -> TensorDataset:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): ten kinds of clothes, in files of MNIST's names
    and format. Reads and raises as `mnist` does; nothing in the files tells the two apart.
    """
    return _images("fashion_mnist", root, split)


def _images(name: str, root: Path_, split: str) -> TensorDataset:
    if split not in _FILES:
        raise ValueError(f"{name}: split must be 'train' or 'test', got {split!r}")
    found = {part: find(root, files, ("", ".gz")) for part, files in _FILES.items()}
    halved = not any(found["train"]) and all(found["test"])
    images_path, labels_path = found["test" if halved else split]
    if images_path is None or labels_path is None:
        absent = [file for file, path in zip(_FILES[split], found[split]) if path is None]
        raise missing(name, root, absent, HINTS[name])
    images, labels = _pair(images_path, labels_path)
    if halved:
        rows = every_fifth(labels)[split]
        images, labels = images[rows], labels[rows]
    return TensorDataset(as_tensor(scaled(images[:, None], 255)), as_tensor(labels))


def _pair(
    images_path: Path, labels_path: Path
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    # the labels first: a few kilobytes, and they bound what the images may take
    labels = read_idx(labels_path)
    if labels.dtype != np.uint8 or labels.ndim != 1 or not len(labels):
        raise DataError(
            labels_path, f"labels must be uint8 (N,), got {labels.dtype} {labels.shape}"
        )
    check_labels(labels, 10, labels_path)
    images = read_idx(images_path)
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
        raise DataError(
            images_path, f"images must be uint8 (N, 28, 28), got {images.dtype} {images.shape}"
        )
    if len(images) != len(labels):
        problem = f"{len(images)} images, but {len(labels)} labels in {labels_path}"
        raise DataError(images_path, problem)
    return images, labels.astype(np.int64)
