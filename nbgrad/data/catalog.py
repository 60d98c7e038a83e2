"""Datasets by name."""

from __future__ import annotations

from nbgrad.data import cifar, idx, prepare
from nbgrad.data.dataset import TensorDataset
from nbgrad.data.digits import digits
from nbgrad.data.files import Path_

_READERS = {"mnist": idx.mnist, "fashion_mnist": idx.fashion_mnist, "cifar10": cifar.cifar10}
_HINTS = {**idx.HINTS, "cifar10": cifar.HINT}
NAMES = ("digits", *_READERS)


def load(
    name: str, root: Path_ | None = None, *, standardize: bool = False
) -> tuple[TensorDataset, TensorDataset]:
    """(train, test) of the dataset `name`: "digits" (needs no files), "mnist",
    "fashion_mnist" or "cifar10".

    `root` is the folder of the files. With `standardize`, each channel has mean 0 and std 1 over
    the training images.

    Raises:
        ValueError: an unknown name, or no root where one is needed.
        FileNotFoundError: naming the files looked for.
        DataError: a damaged file.

    >>> train, test = load("digits")
    >>> len(train), len(test)
    (1437, 360)
    """
    if name not in NAMES:
        raise ValueError(f"unknown dataset {name!r}; there are {', '.join(NAMES)}")
    if name == "digits":
        train, test = digits()
    elif root is None:
        raise ValueError(f"dataset {name!r} needs root, the folder of its files: {_HINTS[name]}")
    else:
        train, test = (_READERS[name](root, split) for split in ("train", "test"))
    return prepare.standardize(train, test) if standardize else (train, test)
