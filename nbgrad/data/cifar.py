"""CIFAR-10 (Krizhevsky 2009), binary version: records of one label byte and 3 × 32 × 32 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from nbgrad.autograd import as_tensor
from nbgrad.data.dataset import TensorDataset
from nbgrad.data.files import DataError, Path_, find, missing, read_exactly, regular_size
from nbgrad.data.prepare import check_labels, scaled

_RECORD = 1 + 3 * 32 * 32
_MAX_RECORDS = 10_000  # per file, in the published ones
_FOLDER = "cifar-10-batches-bin"
_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
HINT = ("unpack https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz there, the binary version, "
        f"not the pickled one of Python ({_FOLDER}); nbgrad does not download")


def cifar10(root: Path_, split: str = "train") -> TensorDataset:
    """CIFAR-10 (Krizhevsky 2009): images float32 (N, 3, 32, 32) in 0..1, labels int64 (N,).

    Files: data_batch_1.bin to data_batch_5.bin ("train") and test_batch.bin ("test"), in `root` or
    in its folder cifar-10-batches-bin.

    Raises:
        FileNotFoundError: naming the files looked for.
        DataError: a file that is not 1 to 10,000 records of 3073 bytes, a label outside 0..9.
        ValueError: a split other than "train" and "test".
    """
    if split not in _FILES:
        raise ValueError(f"cifar10: split must be 'train' or 'test', got {split!r}")
    inside = Path(root) / _FOLDER
    folder = inside if inside.is_dir() else Path(root)
    found = dict(zip(_FILES[split], find(folder, _FILES[split])))
    absent = [name for name, path in found.items() if path is None]
    if absent:
        raise missing("cifar10", folder, absent, HINT)
    records = [_records(path) for path in found.values() if path]
    images = np.empty((sum(map(len, records)), 3, 32, 32), np.float32)
    at = 0
    for part in records:  # scaled file by file: the train images are 614 MB as float32
        images[at : at + len(part)] = scaled(part[:, 1:], 255).reshape(-1, 3, 32, 32)
        at += len(part)
    labels = np.concatenate([part[:, 0] for part in records]).astype(np.int64)
    return TensorDataset(as_tensor(images), as_tensor(labels))


def _records(path: Path) -> npt.NDArray[np.uint8]:
    """The records of one file, uint8 (n, 3073)."""
    size = regular_size(path, _RECORD * _MAX_RECORDS)
    if not size or size % _RECORD:
        raise DataError(path, f"{size} bytes are not a whole number of {_RECORD}-byte records")
    with open(path, "rb") as stream:
        records = read_exactly(stream, size, path).reshape(-1, _RECORD)
    check_labels(records[:, 0], 10, path)
    return records
